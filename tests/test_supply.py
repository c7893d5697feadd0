"""A supply holds a bounded number of batches, however long it goes on."""

from __future__ import annotations

import dataclasses
import weakref
from pathlib import Path

import pyarrow as pa
import pytest

from pipelines.data.batch import Batch
from pipelines.data.shard_set import ShardSet, read_shard_set
from tests.small_runs import small_run, supply_of
from tests.small_sets import write_set


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    folder: Path = tmp_path_factory.mktemp("supply") / "set"
    return read_shard_set(write_set(folder, groups=[[40, 40], [40, 37]]))


@pytest.mark.parametrize("num_prefetch", [1, 3])
def test_batches_wait_within_their_bound(
    shards: ShardSet, num_prefetch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: weakref.WeakSet[Batch] = weakref.WeakSet()

    @dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
    class Counted(Batch):
        __hash__ = object.__hash__

        def __post_init__(self) -> None:
            alive.add(self)

    monkeypatch.setattr("pipelines.data.batching.Batch", Counted)
    run = small_run(shards.address, num_epochs=6)
    data = dataclasses.replace(run.data, num_prefetch_batches=num_prefetch)
    supply = supply_of(dataclasses.replace(run, data=data), shards=shards)
    held, encoded, memory = [], [], set()
    try:
        for batch in supply:
            held.append(len(alive))
            encoded.append(pa.total_allocated_bytes())
            memory.add(batch.images.data_ptr())
    finally:
        supply.close()
    assert len(held) == 6 * 14
    # Those that wait, one that the thread holds, and two that the loop may hold.
    assert max(held) <= num_prefetch + 3
    # Memory for pixels is lent again: as many places as batches, not one for each.
    assert len(memory) <= num_prefetch + 4
    assert max(encoded) < 3 * max(encoded[:14])


def test_breaking_off_loses_no_batch(shards: ShardSet) -> None:
    supply = supply_of(small_run(shards.address), shards=shards)
    try:
        seen = []
        for _ in range(3):
            for batch in supply:
                seen.append((batch.epoch, batch.index))
                if len(seen) % 5 == 0:
                    break
        assert seen == [(0, at) for at in range(14)] + [(1, 0)]
    finally:
        supply.close()
    assert list(supply) == []  # it ends for good
