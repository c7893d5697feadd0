"""Chain datasets into one worker's stream of share tables over many epochs.

A new Ray dataset costs seconds of start-up, so one spans several epochs, and the next
is made ready while this one is read.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator

import pyarrow as pa

from pipelines.checkpoint import Position
from pipelines.config import Data
from pipelines.ingest.footers import ShardSet
from pipelines.ingest.plan import EpochPlan, Unit, plan_epoch

# A dataset holds its read tasks in memory; a thousand of them are a few megabytes.
_UNITS_PER_DATASET = 1000
Open = Callable[[list[Unit] | None], Iterator[pa.Table]]


def training_plan(shards: ShardSet, *, data: Data, seed: int, epoch: int) -> EpochPlan:
    """Plan an epoch of training."""
    return plan_epoch(
        shards.groups,
        batch_size=data.batch_size,
        shuffle_rows=data.shuffle_rows,
        seed=seed,
        epoch=epoch,
    )


def evaluation_plan(shards: ShardSet, *, data: Data, epoch: int) -> EpochPlan:
    """Plan an evaluation: the rows in the order of the files."""
    return plan_epoch(
        shards.groups,
        batch_size=data.eval_batch_size,
        shuffle_rows=data.shuffle_rows,
        epoch=epoch,
        shuffle=False,
    )


class EpochStream:
    """Yield a worker's share tables from a position to the last epoch's end.

    Args:
        plan: plans an epoch; called on the worker that plans, None on the others.
        open_units: starts reading units on all workers together and gives this
            worker's tables. It is called with the units where `plan` is given, and
            with None elsewhere.
        units_per_epoch: the same on all workers, so that they call in step.
    """

    def __init__(
        self,
        *,
        plan: Callable[[int], EpochPlan] | None,
        open_units: Open,
        units_per_epoch: int,
        start: Position,
        num_epochs: int,
    ) -> None:
        self._plan = plan
        self._open = open_units
        self._epochs_at_once = max(_UNITS_PER_DATASET // units_per_epoch, 1)
        self._next_epoch = start.epoch
        self._start = start
        self._num_epochs = num_epochs
        self._opened: queue.Queue[Iterator[pa.Table] | None] = queue.Queue()
        self._ends: list[int] = []
        self._open_next()
        self._open_next()

    def tables(self) -> Iterator[pa.Table]:
        """Yield the tables; blocks where the next dataset is not opened yet."""
        while (opened := self._opened.get()) is not None:
            yield from opened

    def epoch_ended(self, epoch: int) -> None:
        """Make a further dataset ready where one is used up; all workers call it."""
        if self._ends and epoch >= self._ends[0]:
            self._ends.pop(0)
            self._open_next()

    def _open_next(self) -> None:
        first = self._next_epoch
        stop = min(first + self._epochs_at_once, self._num_epochs)
        if first >= stop:
            self._opened.put(None)
            return
        self._next_epoch = stop
        self._ends.append(stop)
        units: list[Unit] | None = None
        if self._plan is not None:
            units = [
                unit
                for epoch in range(first, stop)
                for unit in self._plan(epoch).units(
                    start_batch=self._start.batch if epoch == self._start.epoch else 0
                )
            ]
        self._opened.put(self._open(units))
