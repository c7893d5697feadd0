"""Time an epoch's plan, the units that come of it, and the set that workers get."""

from __future__ import annotations

import functools
import pickle
import time
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.scale.model import Shards, group_table
from pipelines.ingest.footers import ShardSet
from pipelines.ingest.plan import EpochPlan, GroupTable, plan_epoch
from pipelines.ingest.reading import Reading, share_tables
from pipelines.ingest.source import read_task

_SHUFFLE_ROWS = 2048
_NUM_UNITS = 20
_ADDRESS = "s3://bucket/imagenet/train"
_CLASSES = tuple(f"class {number}" for number in range(1000))


@dataclass(frozen=True, kw_only=True)
class UnitCost:
    """Hold what the units cost that are cut for some workers."""

    num_workers: int
    num_slices: int
    ms: float
    """To work out one, of some."""
    task_bytes: int
    """Of its pickled read task."""


@dataclass(frozen=True, kw_only=True)
class PlanCost:
    """Hold what a set of some size costs those who plan and know it."""

    num_images: int
    num_shards: int
    num_groups: int
    plan_s: float
    plan_mb: float
    """Memory that planning takes at its peak, beside the set's."""
    set_mb: float
    """Of the pickled set, numbers included."""
    set_bytes_per_shard: float
    """Of what is no array: workers of a host do not share it."""
    set_load_s: float
    units: tuple[UnitCost, ...]


def measure_plan(
    shards: Shards, *, num_gpus: Sequence[int], images_per_gpu: int, num_rounds: int
) -> PlanCost:
    """Plan an epoch of a set some times for its time, and once more for its memory.

    Times are CPU seconds, which other jobs do not take, and the least of all rounds.
    """
    groups = group_table(shards)
    batch_size = images_per_gpu * num_gpus[0]
    # What is counted once for a set is counted before.
    plan_s = _least_cpu_s(
        lambda: _plan(groups, batch_size=batch_size), num_rounds=num_rounds
    )
    tracemalloc.start()
    _plan(groups, batch_size=batch_size)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    num_bytes, of_paths, load_s = _carry(groups)
    return PlanCost(
        num_images=shards.num_images,
        num_shards=shards.num_shards,
        num_groups=len(groups.num_rows),
        plan_s=plan_s,
        plan_mb=peak / 1e6,
        set_mb=num_bytes / 1e6,
        set_bytes_per_shard=of_paths / shards.num_shards,
        set_load_s=load_s,
        units=tuple(
            _measure_units(
                groups,
                num_workers=num,
                images_per_gpu=images_per_gpu,
                num_rounds=num_rounds,
            )
            for num in num_gpus
        ),
    )


def _plan(groups: GroupTable, *, batch_size: int) -> EpochPlan:
    return plan_epoch(groups, batch_size=batch_size, shuffle_rows=_SHUFFLE_ROWS)


def _least_cpu_s(function: Callable[[], object], *, num_rounds: int) -> float:
    times_s = []
    for _ in range(num_rounds):
        start_s = time.process_time()
        function()
        times_s.append(time.process_time() - start_s)
    return min(times_s)


def _measure_units(
    groups: GroupTable, *, num_workers: int, images_per_gpu: int, num_rounds: int
) -> UnitCost:
    plan = _plan(groups, batch_size=images_per_gpu * num_workers)
    places = range(min(_NUM_UNITS, plan.shape.num_units))
    units = list(plan.units(places=places))
    seconds = _least_cpu_s(
        lambda: list(plan.units(places=places)), num_rounds=num_rounds
    )
    reading = Reading(
        address=_ADDRESS, num_classes=len(_CLASSES), num_workers=num_workers
    )
    read = functools.partial(share_tables, units[0], reading=reading)
    return UnitCost(
        num_workers=num_workers,
        num_slices=len(units[0].slices),
        ms=1000 * seconds / len(units),
        task_bytes=len(pickle.dumps(read_task(read, unit=units[0]))),
    )


def _carry(groups: GroupTable) -> tuple[int, int, float]:
    """Pickle a set as Ray does: arrays apart, which workers of a host then share.

    Returns all bytes, those of what is no array, and the seconds to unpickle them.
    """
    shards = ShardSet(
        address=_ADDRESS, classes=_CLASSES, groups=groups, digest="0" * 16
    )
    arrays: list[pickle.PickleBuffer] = []
    pickled = pickle.dumps(shards, protocol=5, buffer_callback=arrays.append)
    start_s = time.perf_counter()
    pickle.loads(pickled, buffers=arrays)
    seconds = time.perf_counter() - start_s
    num_array_bytes = sum(array.raw().nbytes for array in arrays)
    return len(pickled) + num_array_bytes, len(pickled), seconds
