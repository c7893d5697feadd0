"""Stream planned units to the workers with Ray Data: the only file that imports it."""

from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from typing import TypeVar, cast

import pyarrow as pa
from ray.data import (
    DataContext,
    DataIterator,
    Datasource,
    ExecutionResources,
    ReadTask,
    read_datasource,
)
from ray.data.block import BlockMetadata

from pipelines.config import CPUS_PER_READ, Data
from pipelines.data.epoch_plan import Unit
from pipelines.data.reading import MAX_SHARE_BYTES, Reading, share_tables

_MIB = 1 << 20
T = TypeVar("T")


class TaskSource(Datasource):
    """Datasource of given read tasks, in order."""

    def __init__(self, tasks: Sequence[ReadTask]) -> None:
        super().__init__()
        self._tasks = tasks

    def estimate_inmemory_data_size(self) -> int | None:
        """Return no estimate: shares are small and back-pressure is by their number."""
        return None

    def get_read_tasks(
        self,
        parallelism: int,
        per_task_row_limit: int | None = None,
        data_context: DataContext | None = None,
    ) -> list[ReadTask]:
        """Return all tasks, whatever parallelism Ray requests."""
        return list(self._tasks)


def read_task(
    read: Callable[[], Iterable[pa.Table]], *, unit: Unit, num_rows: int | None = None
) -> ReadTask:
    """Build the task that reads a unit; `num_rows` are those of its blocks, if known.

    A task carries its own unit only: the set's footers would be megabytes.
    """
    metadata = BlockMetadata(
        num_rows=num_rows,
        size_bytes=None,
        input_files=tuple({item.path: None for item in unit.slices}),
        exec_stats=None,
    )
    return ReadTask(read, metadata)


def reader_labels(data: Data) -> dict[str, str] | None:
    """Return Ray's label selector for the nodes that read; None is any."""
    label, _, value = data.reader_label.partition("=")
    return {label: value} if label else None


def split_units(
    units: Sequence[Unit], *, reading: Reading, data: Data
) -> list[DataIterator]:
    """Make a dataset over units and split it: one iterator for each worker.

    Ray deals blocks to the worker that has the fewest rows. Here a block is one row, a
    worker's share of some batches, so with the order preserved they go round in turn.
    """
    decodes = reading.decode is not None
    tasks = [
        # Each unit's tables are its workers' shares.
        read_task(functools.partial(share_tables, unit, reading=reading), unit=unit)
        for unit in units
    ]
    dataset = read_datasource(
        TaskSource(tasks),
        num_cpus=float(data.num_decode_threads) if decodes else CPUS_PER_READ,
        concurrency=data.num_readers,
        override_num_blocks=len(units),
        label_selector=reader_labels(data),
    )
    options = dataset.context.execution_options
    options.preserve_order = True
    # What was read and waits in the object store, over all workers.
    options.resource_limits = ExecutionResources.for_limits(
        object_store_memory=reading.num_workers * data.read_ahead_mb * _MIB
    )
    # Blocks are cut where they pass this size, and never within a row: one row each.
    dataset.context.target_max_block_size = 1
    dataset.context.enable_progress_bars = False
    return dataset.streaming_split(reading.num_workers, equal=False)


def shares(iterator: DataIterator, *, data: Data) -> Iterator[pa.Table]:
    """Yield a worker's share tables; their bytes stay in Ray's shared memory."""
    # None, "whole blocks", is documented but missing from the annotation.
    tables = iterator.iter_batches(
        batch_size=cast(int, None),
        batch_format="pyarrow",
        prefetch_batches=max(data.read_ahead_mb * _MIB // MAX_SHARE_BYTES, 1),
    )
    return begun(iter(tables))


def begun(items: Iterator[T]) -> Iterator[T]:
    """Request the first item on a thread at once: Ray starts reading on request."""
    first: Future[list[T]] = Future()

    def take() -> None:
        try:
            first.set_result(list(itertools.islice(items, 1)))
        except BaseException as error:
            first.set_exception(error)

    threading.Thread(target=take, name="first share", daemon=True).start()

    def rest() -> Iterator[T]:
        yield from first.result()
        yield from items

    return rest()
