"""End a sweep when its trials have had what it may cost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ray import tune


class Budget(tune.Stopper):
    """Stop all trials once `spent` gives as many hours as are allowed; 0 is no limit.

    Looked at whenever a trial reports, or one begins: an epoch may still pass.
    """

    def __init__(self, max_hours: float, *, spent: Callable[[], float]) -> None:
        self._max_hours, self._spent = max_hours, spent

    def __getstate__(self) -> dict[str, Any]:
        """Leave nothing in the copy that Tune writes: a sweep goes on without it."""
        return {}

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Stop no trial by itself."""
        return False

    def stop_all(self) -> bool:
        """Tell whether the budget is used up."""
        return 0 < self._max_hours <= self._spent()
