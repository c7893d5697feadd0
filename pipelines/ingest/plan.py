"""Plan an epoch: which rows come in which order, cut into read units.

Pure functions of the shards' footers, the seed and the epoch. A seeded permutation of
row groups gives a sequence of rows; it is cut into units of `unit_rows`, and the rows
of a unit are shuffled among each other. Unit bounds are batch bounds, so the n-th
batch of an epoch holds the same rows at any number of workers, and "how far" is one
number. A row group that straddles a bound is read by both units, each taking its part.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from pipelines.hashing import Purpose, key, seeded_order


@dataclass(frozen=True, kw_only=True)
class GroupTable:
    """List the row groups of a shard set, by file and then by place in the file."""

    paths: tuple[str, ...]
    """Files of the set, sorted."""
    file: np.ndarray
    """int32 (num_groups,): which file."""
    place: np.ndarray
    """int32 (num_groups,): which row group of that file."""
    num_rows: np.ndarray
    """int32 (num_groups,)."""

    @property
    def total_rows(self) -> int:
        """Count the rows of the set."""
        return int(self.num_rows.sum(dtype=np.int64))


@dataclass(frozen=True, kw_only=True)
class Slice:
    """Name some rows of one row group."""

    path: str
    place: int
    """Which row group of the file."""
    start: int
    stop: int
    first_id: int
    """Id of the group's row 0: its place in the set, files in sorted order."""


@dataclass(frozen=True, kw_only=True)
class Unit:
    """Say what one read task reads, in what order, and which batches that makes."""

    epoch: int
    first_batch: int
    batch_size: int
    num_rows: int
    slices: tuple[Slice, ...]
    row_key: int | None
    """Key of the shuffle of the rows; None keeps the order of the slices."""
    ends_epoch: bool
    start_batch: int = 0
    """Batches of the epoch before this one are left out: they were trained on."""

    @property
    def num_batches(self) -> int:
        """Count the batches that the unit's rows make; the last may be short."""
        return math.ceil(self.num_rows / self.batch_size)

    def order(self) -> np.ndarray:
        """Give the order of the rows: int64 (num_rows,)."""
        if self.row_key is None:
            return np.arange(self.num_rows)
        return seeded_order(self.num_rows, key=self.row_key)


@dataclass(frozen=True, kw_only=True)
class EpochPlan:
    """Hold one epoch's order; cheap to build, units are worked out when asked for."""

    groups: GroupTable
    order: np.ndarray
    """int64 (num_groups,): row groups in reading order."""
    ends: np.ndarray
    """int64 (num_groups,): rows up to and including each group, in reading order."""
    first_ids: np.ndarray
    """int64 (num_groups,): id of each group's first row, by group."""
    unit_rows: int
    batch_size: int
    row_key: int | None
    """Key of the shuffle within units; None keeps the order of the files."""
    epoch: int

    @property
    def num_rows(self) -> int:
        """Count the rows of the epoch."""
        return int(self.ends[-1])

    @property
    def num_batches(self) -> int:
        """Count the global batches of the epoch; the last one may be short."""
        return math.ceil(self.num_rows / self.batch_size)

    @property
    def num_units(self) -> int:
        """Count the read units of the epoch."""
        return math.ceil(self.num_rows / self.unit_rows)

    @property
    def batches_per_unit(self) -> int:
        """Count the batches of every unit but the last."""
        return self.unit_rows // self.batch_size

    def unit(self, index: int, *, start_batch: int = 0) -> Unit:
        """Work out one read unit."""
        start = index * self.unit_rows
        stop = min(start + self.unit_rows, self.num_rows)
        return Unit(
            epoch=self.epoch,
            first_batch=start // self.batch_size,
            batch_size=self.batch_size,
            num_rows=stop - start,
            slices=tuple(self._slices(start, stop)),
            row_key=None if self.row_key is None else key(self.row_key, index),
            ends_epoch=stop == self.num_rows,
            start_batch=start_batch,
        )

    def units(self, *, start_batch: int = 0) -> Iterator[Unit]:
        """Yield the units that hold batches from `start_batch` on."""
        for index in range(start_batch // self.batches_per_unit, self.num_units):
            yield self.unit(index, start_batch=start_batch)

    def _slices(self, start: int, stop: int) -> Iterator[Slice]:
        first = int(np.searchsorted(self.ends, start, side="right"))
        last = int(np.searchsorted(self.ends, stop, side="left"))
        for at in range(first, last + 1):
            group = int(self.order[at])
            begin = int(self.ends[at]) - int(self.groups.num_rows[group])
            yield Slice(
                path=self.groups.paths[self.groups.file[group]],
                place=int(self.groups.place[group]),
                start=max(start - begin, 0),
                stop=min(stop, int(self.ends[at])) - begin,
                first_id=int(self.first_ids[group]),
            )


def plan_epoch(
    groups: GroupTable,
    *,
    batch_size: int,
    shuffle_rows: int,
    seed: int = 0,
    epoch: int = 0,
    shuffle: bool = True,
) -> EpochPlan:
    """Plan an epoch; the same arguments give the same plan on every machine.

    Args:
        shuffle_rows: Rows shuffled among each other, rounded up to whole batches.
        shuffle: False reads the files in order, for evaluation.
    """
    num_groups = len(groups.num_rows)
    if num_groups == 0 or groups.total_rows == 0:
        raise ValueError("wanted a shard set with rows, came one with none")
    order = (
        seeded_order(num_groups, key=key(seed, epoch, Purpose.GROUPS))
        if shuffle
        else np.arange(num_groups)
    )
    rows = groups.num_rows.astype(np.int64)
    return EpochPlan(
        groups=groups,
        order=order,
        ends=np.cumsum(rows[order]),
        first_ids=np.cumsum(rows) - rows,
        unit_rows=math.ceil(shuffle_rows / batch_size) * batch_size,
        batch_size=batch_size,
        row_key=key(seed, epoch, Purpose.ROWS) if shuffle else None,
        epoch=epoch,
    )


def share(num_rows: int, *, num_parts: int, part: int) -> tuple[int, int]:
    """Cut rows into parts of like length; return the bounds of one part.

    The parts cover every row once and differ by at most one row in length.
    """
    return num_rows * part // num_parts, num_rows * (part + 1) // num_parts
