"""Plan an epoch: which rows come in which order, cut into read units.

Pure functions of the shards' footers, the seed and the epoch. A seeded permutation of
row groups gives a sequence of rows; it is cut into units of `unit_rows`, and the rows
of a unit are shuffled among each other. Unit bounds are batch bounds, so the n-th
batch of an epoch holds the same rows at any number of workers, and "how far" is one
number. A row group that straddles a bound is read by both units, each taking its part.

With repeated augmentation a batch holds fewer rows, each several times, and an epoch
its part of the sequence: the whole passes once in `num_repeats` epochs. Rows are
counted without their repetitions here.

A balanced epoch (`data.balance`) has as many rows, but some come several times and
others not at all. It is a sequence of rounds, each through all groups in an order of
its own, of which it takes the rows whose turn it is.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from pipelines.data.balance import Balance, group_sizes, taken
from pipelines.rng import Purpose, key, seeded_order


@dataclass(frozen=True, kw_only=True)
class GroupTable:
    """Row groups of a shard set, by file and then by place in the file.

    Small enough for 10^9 rows: four bytes a group, and a few numbers a file.
    """

    paths: tuple[str, ...]
    """Files of the set, sorted."""
    num_groups: np.ndarray
    """int32 (num_files,): row groups of each file."""
    num_rows: np.ndarray
    """int32 (num_groups,)."""

    @property
    def total_rows(self) -> int:
        """Number of rows in the set."""
        return int(self._first_rows[-1])

    @functools.cached_property
    def _first_groups(self) -> np.ndarray:
        return np.concatenate([[0], np.cumsum(self.num_groups, dtype=np.int64)])

    @functools.cached_property
    def _first_rows(self) -> np.ndarray:
        bounds = itertools.pairwise(self._first_groups.tolist())
        rows = [int(self.num_rows[a:b].sum(dtype=np.int64)) for a, b in bounds]
        return np.concatenate([[0], np.cumsum(rows, dtype=np.int64)])

    def slice_of(self, group: int, *, start: int = 0, stop: int | None = None) -> Slice:
        """Return a slice of one group, `start` to `stop`; all of it by default."""
        file = int(np.searchsorted(self._first_groups, group, side="right")) - 1
        first_group = int(self._first_groups[file])
        before = int(self.num_rows[first_group:group].sum(dtype=np.int64))
        return Slice(
            path=self.paths[file],
            place=group - first_group,
            start=start,
            stop=int(self.num_rows[group]) if stop is None else stop,
            first_id=int(self._first_rows[file]) + before,
        )

    def path_of(self, row_id: int) -> str:
        """Return the path of the file that contains a row."""
        file = int(np.searchsorted(self._first_rows, row_id, side="right")) - 1
        return self.paths[file]


@dataclass(frozen=True, kw_only=True)
class Slice:
    """Slice of the rows of one row group."""

    path: str
    place: int
    """Index of the row group in the file."""
    start: int
    stop: int
    first_id: int
    """Id of the group's row 0: its index in the set, files in sorted order."""
    shown: bytes = b""
    """Of a balanced plan, whose `start` and `stop` are not rows: see `taken`."""

    def taken(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the rows of the group, and which showing in its epoch each is."""
        if self.shown:
            rows, showings = np.frombuffer(self.shown, np.int32).reshape(2, -1)
            return rows, showings
        rows = np.arange(self.start, self.stop)
        return rows, np.zeros_like(rows)

    def ids(self) -> np.ndarray:
        """Compute the ids of its rows."""
        return self.taken()[0] + self.first_id


@dataclass(frozen=True, kw_only=True)
class Unit:
    """Read unit: what one read task reads, in what order, for which batches."""

    epoch: int
    first_batch: int
    batch_size: int
    num_rows: int
    slices: tuple[Slice, ...]
    row_key: int | None
    """Key for shuffling the rows; None keeps the order of the slices."""
    ends_epoch: bool
    start_batch: int = 0
    """Earlier batches of the epoch are left out: they were trained on."""
    num_repeats: int = 1
    """Number of repetitions of each row in its batch."""

    @property
    def num_batches(self) -> int:
        """Number of batches that the unit's rows make; the last may be short."""
        return math.ceil(self.num_rows / self.batch_size)

    def ids(self) -> np.ndarray:
        """Compute the ids of the rows, in the order of the slices."""
        return np.concatenate([item.ids() for item in self.slices])

    def order(self) -> np.ndarray:
        """Compute the order of the rows: int64 (num_rows,)."""
        if self.row_key is None:
            return np.arange(self.num_rows)
        return seeded_order(self.num_rows, key=self.row_key)


@dataclass(frozen=True, kw_only=True)
class EpochShape:
    """Counts of an epoch; the only input from the footers is their number of rows."""

    epoch: int
    first_row: int
    """First row of the epoch's part of the sequence of rows."""
    num_rows: int
    unit_rows: int
    batch_size: int
    """Rows of a batch, without their repetitions."""
    num_repeats: int

    @property
    def num_images(self) -> int:
        """Number of images that the epoch trains on, repetitions included."""
        return self.num_rows * self.num_repeats

    @property
    def num_batches(self) -> int:
        """Number of global batches of the epoch; the last one may be short."""
        return math.ceil(self.num_rows / self.batch_size)

    @property
    def num_units(self) -> int:
        """Number of read units of the epoch."""
        return math.ceil(self.num_rows / self.unit_rows)

    @property
    def batches_per_unit(self) -> int:
        """Number of batches of every unit but the last."""
        return self.unit_rows // self.batch_size


def epoch_shape(
    total_rows: int,
    *,
    batch_size: int,
    shuffle_rows: int,
    epoch: int = 0,
    num_repeats: int = 1,
) -> EpochShape:
    """Compute an epoch's counts; arguments as for `plan_epoch`.

    Raises ValueError where there are not enough rows.
    """
    if total_rows < 1:
        raise ValueError("expected a shard set with rows, got one with none")
    if total_rows < num_repeats:
        raise ValueError(
            f"expected at least {num_repeats} images, one for each epoch in which a "
            f"part of them comes, got {total_rows}; lower --augment.num-repeats"
        )
    part = epoch % num_repeats
    # Rounded up, so that epoch 0 is the longest of a pass: it gives the step count.
    first_row, stop = (
        -(-total_rows * bound // num_repeats) for bound in (part, part + 1)
    )
    return EpochShape(
        epoch=epoch,
        first_row=first_row,
        num_rows=stop - first_row,
        unit_rows=math.ceil(shuffle_rows / batch_size) * (batch_size // num_repeats),
        batch_size=batch_size // num_repeats,
        num_repeats=num_repeats,
    )


@dataclass(frozen=True, kw_only=True)
class EpochPlan:
    """Plan of one epoch's order; cheap to build, units are computed on demand."""

    shape: EpochShape
    groups: GroupTable
    order: np.ndarray
    """uint32 (num_groups,): row groups in reading order. Of a balanced plan (rounds x
    num_groups,), where a group of round r is r * num_groups + its index."""
    ends: np.ndarray
    """int64, of like shape: rows up to and including each group, in reading order."""
    row_key: int | None
    """Key for shuffling within units; None keeps the order of the files."""
    shown: np.ndarray | None = None
    """Of a balanced plan: see `Balance.before_rounds`."""

    def unit(self, index: int, *, start_batch: int = 0) -> Unit:
        """Build one read unit."""
        shape = self.shape
        start = index * shape.unit_rows
        stop = min(start + shape.unit_rows, shape.num_rows)
        return Unit(
            epoch=shape.epoch,
            first_batch=start // shape.batch_size,
            batch_size=shape.batch_size,
            num_rows=stop - start,
            slices=tuple(self._slices(shape.first_row + start, shape.first_row + stop)),
            row_key=None if self.row_key is None else key(self.row_key, index),
            ends_epoch=stop == shape.num_rows,
            start_batch=start_batch,
            num_repeats=shape.num_repeats,
        )

    def units(
        self, *, start_batch: int = 0, places: range | None = None
    ) -> Iterator[Unit]:
        """Yield units with batches from `start_batch` on: all, or those in `places`."""
        if places is None:
            first = start_batch // self.shape.batches_per_unit
            places = range(first, self.shape.num_units)
        for index in places:
            yield self.unit(index, start_batch=start_batch)

    def _slices(self, start: int, stop: int) -> Iterator[Slice]:
        first = int(np.searchsorted(self.ends, start, side="right"))
        last = int(np.searchsorted(self.ends, stop, side="left"))
        for at in range(first, last + 1):
            begin = int(self.ends[at - 1]) if at else 0
            place = max(start - begin, 0), min(stop, int(self.ends[at])) - begin
            if place[0] < place[1]:
                yield self._slice(int(self.order[at]), *place)

    def _slice(self, item: int, start: int, stop: int) -> Slice:
        part, group = divmod(item, len(self.groups.num_rows))
        found = self.groups.slice_of(group, start=start, stop=stop)
        if self.shown is None:
            return found
        rows = slice(found.first_id, found.first_id + int(self.groups.num_rows[group]))
        taken_rows = taken(self.shown[part : part + 2, rows])
        return replace(found, shown=taken_rows[:, start:stop].tobytes())


def plan_epoch(
    groups: GroupTable,
    *,
    batch_size: int,
    shuffle_rows: int,
    seed: int = 0,
    epoch: int = 0,
    shuffle: bool = True,
    num_repeats: int = 1,
    balance: Balance | None = None,
) -> EpochPlan:
    """Plan an epoch; the same arguments give the same plan on every machine.

    Args:
        batch_size: Images of a batch, repetitions included.
        shuffle_rows: Rows shuffled among each other, rounded up to whole batches.
        shuffle: False reads the files in order, for evaluation.
        num_repeats: Times that a row comes in its batch (Hoffer et al., 2020). timm
            draws a part of the rows anew each epoch; here the parts of `num_repeats`
            epochs are disjoint and make the whole set.
        balance: Shows rows as often as their classes are due, instead of once each.
    """
    shape = epoch_shape(
        groups.total_rows,
        batch_size=batch_size,
        shuffle_rows=shuffle_rows,
        epoch=epoch,
        num_repeats=num_repeats,
    )
    num_groups = len(groups.num_rows)
    group_key = key(seed, epoch // num_repeats, Purpose.GROUPS)
    shown = None
    if balance is not None:
        shown = balance.before_rounds(epoch)
        sizes = group_sizes(shown, groups.num_rows).ravel()
        order = np.concatenate(
            [
                seeded_order(num_groups, key=key(group_key, part)) + part * num_groups
                for part in range(balance.num_rounds)
            ]
        )
    else:
        sizes = groups.num_rows
        order = (
            seeded_order(num_groups, key=group_key) if shuffle else range(num_groups)
        )
    order = np.asarray(order, dtype=np.uint32)
    return EpochPlan(
        shape=shape,
        groups=groups,
        order=order,
        ends=np.cumsum(sizes[order], dtype=np.int64),
        row_key=key(seed, epoch, Purpose.ROWS) if shuffle else None,
        shown=shown,
    )


def share(num_rows: int, *, num_parts: int, part: int) -> tuple[int, int]:
    """Cut rows into parts of like length; return the bounds of one part.

    The parts cover every row once and differ by at most one row in length.
    """
    return num_rows * part // num_parts, num_rows * (part + 1) // num_parts
