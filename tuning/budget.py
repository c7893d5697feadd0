"""Stop a sweep when its trials have used up its budget of GPU hours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ray import tune


class Budget(tune.Stopper):
    """Stopper of all trials once `spent` reaches the hours allowed; 0 is no limit.

    Checked whenever a trial reports or starts, so trials may overrun by an epoch.
    """

    def __init__(self, max_hours: float, *, spent: Callable[[], float]) -> None:
        self._max_hours, self._spent = max_hours, spent

    def __getstate__(self) -> dict[str, Any]:
        """Return no state for Tune's snapshot: a resumed sweep doesn't use it."""
        return {}

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Return False: the budget never stops a single trial."""
        return False

    def stop_all(self) -> bool:
        """Check whether the budget is used up."""
        return 0 < self._max_hours <= self._spent()
