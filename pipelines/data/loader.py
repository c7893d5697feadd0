"""Load one worker's batches of a split: planned units, a decoder and a thread.

A new Ray dataset costs seconds of start-up, and one holds its read tasks in memory. So
the units of all epochs are cut into *segments* of a thousand, wherever epochs end, and
the next segment's dataset is opened while the last tenth of one is trained on.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import queue
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import pyarrow as pa
import torch

from pipelines.config import Run
from pipelines.data.balance import Balance
from pipelines.data.batch import Batch, Position
from pipelines.data.batching import batches
from pipelines.data.epoch_plan import (
    EpochPlan,
    EpochShape,
    Unit,
    epoch_shape,
    plan_epoch,
)
from pipelines.data.prefetch import Prefetcher
from pipelines.data.reading import Reading, share_tables
from pipelines.data.shard_set import ShardSet
from pipelines.hardware.device import autocast_dtype, is_gpu
from pipelines.transforms.decoder import BatchDecoder
from pipelines.transforms.rows import BadImage

# A thousand read tasks are a few megabytes in memory.
_UNITS_PER_SEGMENT = 1000
# Early enough, too, for a decode thread that takes one batch ahead before it gives any:
# a segment's last batch must not be the one that opens the next segment.
_OPEN_AT_SHARE = 0.9
OnBad = Callable[[tuple[BadImage, ...]], None]


Segment = tuple[tuple[int, range], ...]
"""Epochs, and the places of consecutive units in each."""


class ShardOpener(Protocol):
    """Protocol for starting datasets on all workers, which call it in step."""

    def prepare(self, plan: Callable[[], list[Unit]]) -> None:
        """Start to plan units and build a dataset of them, in the background.

        Only one worker does.
        """
        ...

    def open(self) -> Iterator[pa.Table]:
        """Return this worker's tables of the prepared dataset."""
        ...


class LocalOpener:
    """Opener of units in this process, for one worker without Ray."""

    def __init__(self, reading: Reading) -> None:
        self._reading = reading
        self._plan: Callable[[], list[Unit]] = list

    def prepare(self, plan: Callable[[], list[Unit]]) -> None:
        """Keep the function that plans the units until they are opened."""
        self._plan = plan

    def open(self) -> Iterator[pa.Table]:
        """Return the tables; a unit is read when its first one is taken."""
        return itertools.chain.from_iterable(
            share_tables(unit, reading=self._reading) for unit in self._plan()
        )


@dataclass(frozen=True, kw_only=True)
class Plans:
    """Planner of the epochs of one split of a run."""

    shards: ShardSet
    run: Run
    train: bool

    def shape(self, epoch: int) -> EpochShape:
        """Compute an epoch's counts."""
        return epoch_shape(self.shards.groups.total_rows, epoch=epoch, **self._sizes)

    def plan(self, epoch: int) -> EpochPlan:
        """Plan an epoch; evaluation takes the rows in the order of the files."""
        return plan_epoch(
            self.shards.groups,
            seed=self.run.seed,
            epoch=epoch,
            shuffle=self.train,
            balance=self.balance,
            **self._sizes,
        )

    @functools.cached_property
    def balance(self) -> Balance | None:
        """Balance of the classes, if the run's training has one."""
        exponent, labels = self.run.data.balance, self.shards.labels
        if not exponent or not self.train:
            return None
        assert labels is not None, "read the labels first"
        return Balance(
            labels,
            exponent=exponent,
            num_classes=len(self.shards.classes),
            seed=self.run.seed,
        )

    @property
    def _sizes(self) -> dict[str, int]:
        data = self.run.data
        return {
            "batch_size": data.batch_size if self.train else data.eval_batch_size,
            "shuffle_rows": data.shuffle_rows,
            "num_repeats": self.run.augment.num_repeats if self.train else 1,
        }


def cut_segments(
    shape: Callable[[int], EpochShape],
    *,
    start: Position,
    num_epochs: int,
    num_units: int,
) -> Iterator[Segment]:
    """Cut the units from a position on into segments of `num_units`, the last shorter.

    Args:
        shape: Counts an epoch.
    """
    parts: list[tuple[int, range]] = []
    room = num_units
    for epoch in range(start.epoch, num_epochs):
        counts = shape(epoch)
        first = start.batch // counts.batches_per_unit if epoch == start.epoch else 0
        while first < counts.num_units:
            stop = min(first + room, counts.num_units)
            parts.append((epoch, range(first, stop)))
            room -= stop - first
            first = stop
            if not room:
                yield tuple(parts)
                parts, room = [], num_units
    if parts:
        yield tuple(parts)


class EpochStream:
    """Stream of a worker's share tables from a position to the last epoch's end.

    Args:
        plans: Plans the epochs; all workers count them, one plans them.
        opener: Starts reading on all workers.
        is_planner: True on the one worker that plans.
    """

    def __init__(
        self,
        plans: Plans,
        *,
        opener: ShardOpener,
        is_planner: bool,
        start: Position,
        num_epochs: int,
    ) -> None:
        self._plans = plans
        self._opener = opener
        self._is_planner = is_planner
        self._start = start
        self._segments = cut_segments(
            plans.shape,
            start=start,
            num_epochs=num_epochs,
            num_units=_UNITS_PER_SEGMENT,
        )
        self._opened: queue.Queue[Iterator[pa.Table] | None] = queue.Queue()
        self._planned: EpochPlan | None = None
        self._next = self._prepare()
        self._open_at = (start.epoch, start.batch)
        if self._next is None:  # nothing is left of the run
            self._opened.put(None)
        self.reached(start.epoch, start.batch)

    def tables(self) -> Iterator[pa.Table]:
        """Yield the tables; blocks while the next segment is not open yet."""
        while (opened := self._opened.get()) is not None:
            yield from opened

    def reached(self, epoch: int, batch: int) -> None:
        """Open segments needed soon; all workers call it with the same batches."""
        while self._next is not None and (epoch, batch) >= self._open_at:
            segment = self._next
            self._opened.put(self._opener.open())
            self._open_at = self._late_batch(segment)
            self._next = self._prepare()
            if self._next is None:
                self._opened.put(None)

    def _prepare(self) -> Segment | None:
        segment = next(self._segments, None)
        if segment is not None and self._is_planner:
            self._opener.prepare(functools.partial(self._planned_units, segment))
        return segment

    def _planned_units(self, segment: Segment) -> list[Unit]:
        """Plan a segment: seconds for a thousand units of many slices."""
        return [unit for part in segment for unit in self._units(*part)]

    def _units(self, epoch: int, places: range) -> Iterator[Unit]:
        # A segment may end within an epoch, whose plan then serves the next one too.
        if self._planned is None or self._planned.shape.epoch != epoch:
            self._planned = None  # a large plan's memory goes first
            self._planned = self._plans.plan(epoch)
        start = self._start.batch if epoch == self._start.epoch else 0
        return self._planned.units(start_batch=start, places=places)

    def _late_batch(self, segment: Segment) -> tuple[int, int]:
        """Return the first batch of a segment's last tenth."""
        num_units = sum(len(places) for _, places in segment)
        skip = int(num_units * _OPEN_AT_SHARE)
        for epoch, places in segment:
            if skip < len(places):
                per_unit = self._plans.shape(epoch).batches_per_unit
                return epoch, places[skip] * per_unit
            skip -= len(places)
        raise AssertionError("a segment holds its last tenth")


def ignore_bad(bad: tuple[BadImage, ...]) -> None:
    """Ignore bad images; they are counted all the same."""


def image_dtype(run: Run, *, train: bool, device: torch.device) -> torch.dtype:
    """Choose the dtype of images: bfloat16 where a GPU's step rounds to it.

    Its autocast would round them before the first layer, so the numbers are the same
    and the traffic is half. They stay float32 where something else comes first: mixup,
    which would mix rounded numbers and round again, probes, which run without autocast,
    and evaluation, whose images are looked at. (Cutmix moves numbers as they are.)
    """
    is_first = train and not run.optim.mixup and not run.probe.every_steps
    if not is_gpu(device) or not is_first:
        return torch.float32
    return autocast_dtype(device, amp=run.scale.amp)


def reading_of(
    shards: ShardSet, *, run: Run, train: bool = False, num_workers: int = 1
) -> Reading:
    """Describe how a split's units are read."""
    decodes = run.data.decode_on == "readers"
    return Reading(
        address=shards.address,
        num_classes=len(shards.classes),
        num_workers=num_workers,
        decode=run.pixels(train=train) if decodes else None,
    )


class Loader:
    """Iterator over the batches of all remaining epochs, decoded ahead.

    Breaking off the iteration and starting again resumes with the next batch, so that
    one loader serves many evaluations.

    Args:
        start: Where to start; evaluation starts with a whole epoch.
        opener: Starts reading units on all workers.
        num_epochs: Where the batches end; the run's epochs by default.
        on_bad: Called, on a thread, with images that can't be decoded.
    """

    def __init__(
        self,
        shards: ShardSet,
        *,
        run: Run,
        train: bool,
        start: Position,
        opener: ShardOpener,
        device: torch.device,
        num_epochs: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        on_bad: OnBad = ignore_bad,
    ) -> None:
        self._run, self._train, self._device = run, train, device
        self._world_size = world_size
        self._on_bad = on_bad
        self._batches: Iterator[Batch] | None = None
        self._prefetcher: Prefetcher | None = None
        self._stream = EpochStream(
            Plans(shards=shards, run=run, train=train),
            opener=opener,
            is_planner=rank == 0,
            start=start if train else replace(start, batch=0),
            num_epochs=num_epochs or run.optim.total_epochs,
        )

    def start(self) -> None:
        """Start to read and decode ahead."""
        run, data = self._run, self._run.data
        batch_size = data.batch_size if self._train else data.eval_batch_size
        num_micro = run.num_micro(self._world_size) if self._train else 1
        share_rows = -(-batch_size // self._world_size)
        micro_rows = -(-share_rows // num_micro)
        decode = BatchDecoder(
            run.pixels(train=self._train),
            num_rows=micro_rows,
            device=self._device,
            dtype=image_dtype(run, train=self._train, device=self._device),
            on_bad=self._on_bad,
        )
        items = batches(
            self._stream.tables(),
            num_micro=num_micro,
            micro_rows=micro_rows,
            decode=decode.start,
            num_ahead=decode.num_ahead,
            device=self._device,
        )
        self._prefetcher = Prefetcher(
            items, num_items=data.num_prefetch_batches, device=self._device
        )
        self._batches = iter(self._prefetcher)

    def __iter__(self) -> Iterator[Batch]:
        assert self._batches is not None, "start the supply first"
        for batch in self._batches:
            # All workers take the same batches, so they open the next segment in step.
            self._stream.reached(batch.epoch, batch.index)
            yield batch

    def close(self) -> None:
        """Stop the thread; safe at any moment."""
        if self._prefetcher is not None:
            self._prefetcher.close()


@contextlib.contextmanager
def opened_here(
    shards: ShardSet,
    *,
    run: Run,
    device: torch.device,
    train: bool = False,
    on_bad: OnBad = ignore_bad,
) -> Iterator[Loader]:
    """Open a loader in this process without Ray: evaluation's epoch, or the run's."""
    supply = Loader(
        shards,
        run=run,
        train=train,
        start=Position(),
        opener=LocalOpener(reading_of(shards, run=run, train=train)),
        device=device,
        num_epochs=None if train else 1,
        on_bad=on_bad,
    )
    supply.start()
    try:
        yield supply
    finally:
        supply.close()
