"""Stream planned units to the workers with Ray Data: the only file that imports it."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import cast

import pyarrow as pa
from ray.data import DataContext, DataIterator, Datasource, ReadTask, read_datasource
from ray.data.block import BlockMetadata

from pipelines.ingest.footers import ShardSet
from pipelines.ingest.plan import Unit
from pipelines.ingest.reading import share_tables

# Reads wait for storage more than they compute, so four of them share a CPU.
CPUS_PER_READ = 0.25
_NUM_PREFETCH_SHARES = 2


class UnitSource(Datasource):
    """Offer units as read tasks, in order; each yields its workers' shares."""

    def __init__(
        self, units: Sequence[Unit], *, shards: ShardSet, num_workers: int
    ) -> None:
        super().__init__()
        self._units = units
        self._shards = shards
        self._num_workers = num_workers

    def estimate_inmemory_data_size(self) -> int | None:
        """Decline to guess: shares are small and back-pressure is by their number."""
        return None

    def get_read_tasks(
        self,
        parallelism: int,
        per_task_row_limit: int | None = None,
        data_context: DataContext | None = None,
    ) -> list[ReadTask]:
        """Make one task a unit, whatever parallelism Ray would like."""
        return [self._task(unit) for unit in self._units]

    def _task(self, unit: Unit) -> ReadTask:
        # A task carries its own unit only: the set's footers would be megabytes.
        read = functools.partial(
            share_tables,
            unit,
            address=self._shards.address,
            num_classes=len(self._shards.classes),
            num_workers=self._num_workers,
        )
        metadata = BlockMetadata(
            num_rows=None,
            size_bytes=None,
            input_files=tuple({item.path: None for item in unit.slices}),
            exec_stats=None,
        )
        return ReadTask(read, metadata)


def split_units(
    units: Sequence[Unit], *, shards: ShardSet, num_workers: int, num_readers: int
) -> list[DataIterator]:
    """Start a dataset over units and split it: one iterator for each worker.

    Ray deals blocks to the worker that has the fewest rows. Here a block is one row, a
    worker's share of some batches, so with the order preserved they go round in turn.
    """
    source = UnitSource(units, shards=shards, num_workers=num_workers)
    dataset = read_datasource(
        source,
        num_cpus=CPUS_PER_READ,
        concurrency=num_readers,
        override_num_blocks=len(units),
    )
    dataset.context.execution_options.preserve_order = True
    # Blocks are cut where they pass this size, and never within a row: one row each.
    dataset.context.target_max_block_size = 1
    dataset.context.enable_progress_bars = False
    return dataset.streaming_split(num_workers, equal=False)


def shares(iterator: DataIterator) -> Iterator[pa.Table]:
    """Yield a worker's share tables; their bytes stay in Ray's shared memory."""
    # None, "whole blocks", is documented but missing from the annotation.
    yield from iterator.iter_batches(
        batch_size=cast(int, None),
        batch_format="pyarrow",
        prefetch_batches=_NUM_PREFETCH_SHARES,
    )
