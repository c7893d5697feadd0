"""Evaluate on all of a run's workers together, between two of its epochs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch

from pipelines.config import Run
from pipelines.data.batch import Batch
from pipelines.evaluation.checkpoint import named, reports_of
from pipelines.evaluation.figures import pictured
from pipelines.evaluation.held_out import HeldOut
from pipelines.evaluation.measure import (
    EvaluationResult,
    Score,
    check_counted,
    models_of,
    validate,
)
from pipelines.events.channel import Figure
from pipelines.hardware.row_limit import RowLimit
from pipelines.training.state import TrainState

_PICTURES_EVERY_S = 600.0
OpenBatches = Callable[[HeldOut], Iterable[Batch]]


class InTrainingEvaluator:
    """Evaluator of a training state on the held-out sets.

    All workers call it at the same step: it is a collective.

    Args:
        batches: Opens a worker's batches of a set; they may be broken off.
        limit: Limit of the rows of a pass; what one evaluation finds the next keeps.
    """

    def __init__(
        self,
        sets: Sequence[HeldOut],
        *,
        run: Run,
        device: torch.device,
        batches: OpenBatches,
        limit: RowLimit | None = None,
    ) -> None:
        self._limit = limit or RowLimit()
        self._sets, self._batches = sets, batches
        self._run, self._device = run, device
        self._outcomes: dict[str, EvaluationResult] = {}
        self._pictured_s = time.monotonic()

    def __call__(self, state: TrainState) -> dict[str, float]:
        """Evaluate on all sets; return the metrics by their MLflow names.

        Raises as `check_counted`.
        """
        run = self._run
        average = state.ema.module if state.ema is not None else None
        models = models_of(state.model, average=average, weights=run.validation.weights)
        metrics: dict[str, float] = {}
        self._outcomes = {}
        for one in self._sets:
            outcome = validate(
                models,
                self._batches(one),
                run=run,
                device=self._device,
                held_out=one,
                limit=self._limit,
            )
            check_counted(
                outcome,
                num_rows=one.shards.groups.total_rows,
                max_bad_share=run.data.max_bad_share,
            )
            self._outcomes[one.prefix] = outcome
            metrics |= outcome.metrics(one.prefix)
        return metrics

    @property
    def primary(self) -> Score:
        """Score on the run's own set, the first."""
        return next(iter(self._outcomes.values())).primary

    def pictures(self, *, title: str, is_last: bool) -> Figure | None:
        """Return what draws the last evaluation, if drawing is due or it is the end.

        Drawing takes the driver seconds.
        """
        is_time = time.monotonic() - self._pictured_s > _PICTURES_EVERY_S
        if not (is_last or is_time):
            return None
        self._pictured_s = time.monotonic()
        outcomes: Mapping[str, EvaluationResult] = {
            one.prefix: named(self._outcomes[one.prefix], shards=one.shards)
            for one in self._sets
        }
        return pictured(reports_of(outcomes), title=title)
