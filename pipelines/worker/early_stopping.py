"""Stop a training once its held-out score has not improved for some epochs."""

from __future__ import annotations

import math
from collections.abc import Mapping

from pipelines.checkpoints.store import score_of
from pipelines.config import Validation


class EarlyStopping:
    """Tracker of the best held-out score and of the epochs since.

    Args:
        best_epoch, best_score: Of the best checkpoint, which a run always keeps, where
            a resumed one has any.
    """

    def __init__(
        self,
        validation: Validation,
        *,
        best_epoch: int = 0,
        best_score: float = -math.inf,
    ) -> None:
        self._validation = validation
        self._best_epoch, self._best_score = best_epoch, best_score

    def observe(self, metrics: Mapping[str, float], *, epoch: int) -> None:
        """Take the metrics of an evaluation after so many epochs."""
        score = score_of(metrics, metric=self._validation.metric)
        if score > self._best_score:
            self._best_epoch, self._best_score = epoch, score

    def is_over(self, epoch: int) -> bool:
        """Check whether so many epochs are too many without a better score."""
        patience = self._validation.patience_epochs
        return 0 < patience <= epoch - self._best_epoch

    def reason(self) -> str:
        """Describe in one line why the training ends."""
        return (
            f"ending early: val/{self._validation.metric} has not improved for "
            f"{self._validation.patience_epochs} epochs, the best was in epoch "
            f"{self._best_epoch}"
        )
