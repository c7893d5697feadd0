"""Streams over epochs: nothing twice, nothing lost, and the next made ready."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from pipelines.checkpoint import Position
from pipelines.ingest import stream as stream_module
from pipelines.ingest.feed import rows_of
from pipelines.ingest.footers import ShardSet, read_shard_set
from pipelines.ingest.plan import EpochPlan, Unit
from pipelines.ingest.stream import EpochStream, evaluation_plan, training_plan
from tests.small_runs import small_run
from tests.small_sets import worker_tables, write_set

RUN = small_run("none")
NUM_ROWS, NUM_EPOCHS = 37, 5  # four batches in two units an epoch


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    folder = tmp_path_factory.mktemp("stream") / "set"
    return read_shard_set(write_set(folder, groups=[[5, 9], [7], [1, 11, 4]]))


class Opener:
    """Keep what a stream opens, and read it here."""

    def __init__(self, shards: ShardSet) -> None:
        self.shards = shards
        self.opened: list[list[Unit] | None] = []

    def __call__(self, units: list[Unit] | None) -> Iterator[pa.Table]:
        self.opened.append(units)
        return worker_tables(units or [], shards=self.shards, num_workers=1, worker=0)

    @property
    def epochs(self) -> list[list[int]]:
        return [sorted({unit.epoch for unit in units or []}) for units in self.opened]


def stream_of(
    opener: Opener, *, start: Position | None = None, plans: bool = True
) -> EpochStream:
    def plan(epoch: int) -> EpochPlan:
        return training_plan(opener.shards, data=RUN.data, seed=RUN.seed, epoch=epoch)

    return EpochStream(
        plan=plan if plans else None,
        open_units=opener,
        units_per_epoch=plan(0).num_units,
        start=start or Position(),
        num_epochs=NUM_EPOCHS,
    )


def read_all(stream: EpochStream) -> dict[int, list[int]]:
    """Read to the end as the loop does: tell the stream of every epoch that ended."""
    found: dict[int, list[int]] = {}
    for table in stream.tables():
        epoch = table["epoch"][0].as_py()
        found.setdefault(epoch, []).extend(rows_of(table).ids.tolist())
        if table["ends_epoch"][0].as_py():
            stream.epoch_ended(epoch + 1)
    return found


@pytest.mark.parametrize("units_at_once", [1, 2, 4, 5, 1000])
def test_every_epoch_is_whole_however_many_a_dataset_spans(
    shards: ShardSet, monkeypatch: pytest.MonkeyPatch, units_at_once: int
) -> None:
    monkeypatch.setattr(stream_module, "_UNITS_PER_DATASET", units_at_once)
    opener = Opener(shards)
    found = read_all(stream_of(opener))
    assert list(found) == list(range(NUM_EPOCHS))
    for ids in found.values():
        assert sorted(ids) == list(range(NUM_ROWS))
    assert len({tuple(ids) for ids in found.values()}) == NUM_EPOCHS
    assert list(itertools.chain.from_iterable(opener.epochs)) == list(range(NUM_EPOCHS))
    per_dataset = max(units_at_once // 2, 1)
    assert {len(epochs) for epochs in opener.epochs[:-1]} <= {per_dataset}


def test_one_dataset_is_read_and_one_waits(
    shards: ShardSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream_module, "_UNITS_PER_DATASET", 4)
    opener = Opener(shards)
    stream = stream_of(opener)
    assert opener.epochs == [[0, 1], [2, 3]]
    stream.epoch_ended(1)
    assert opener.epochs == [[0, 1], [2, 3]]
    stream.epoch_ended(2)
    assert opener.epochs == [[0, 1], [2, 3], [4]]
    for epoch in (3, 4, 5):
        stream.epoch_ended(epoch)
    assert len(opener.epochs) == 3


def test_workers_that_do_not_plan_open_as_often(
    shards: ShardSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream_module, "_UNITS_PER_DATASET", 4)
    planner, other = Opener(shards), Opener(shards)
    streams = [stream_of(planner), stream_of(other, plans=False)]
    for epoch in range(1, NUM_EPOCHS + 1):
        for stream in streams:
            stream.epoch_ended(epoch)
        assert len(planner.opened) == len(other.opened)
    assert other.opened == [None] * 3


@pytest.mark.parametrize("batch", [0, 1, 2, 3])
def test_a_stream_goes_on_where_the_position_points(
    shards: ShardSet, batch: int
) -> None:
    whole = read_all(stream_of(Opener(shards)))
    rest = read_all(stream_of(Opener(shards), start=Position(epoch=2, batch=batch)))
    assert list(rest) == [2, 3, 4]
    assert rest[2] == whole[2][batch * RUN.data.batch_size :]
    assert {epoch: rest[epoch] for epoch in (3, 4)} == {e: whole[e] for e in (3, 4)}


def test_a_finished_run_has_nothing_to_read(shards: ShardSet) -> None:
    opener = Opener(shards)
    assert read_all(stream_of(opener, start=Position(epoch=NUM_EPOCHS))) == {}
    assert opener.opened == []


def test_evaluation_has_its_own_batches_in_the_order_of_the_files(
    tmp_path: Path, shards: ShardSet
) -> None:
    plan = evaluation_plan(shards, data=RUN.data, epoch=3)
    assert plan.batch_size == RUN.data.eval_batch_size
    slices = [piece for unit in plan.units() for piece in unit.slices]
    assert [piece.first_id for piece in slices] == sorted(s.first_id for s in slices)
    assert {unit.epoch for unit in plan.units()} == {3}
    assert {unit.row_key for unit in plan.units()} == {None}
