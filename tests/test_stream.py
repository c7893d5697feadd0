"""Streams over epochs: nothing twice, nothing lost, and the next made ready."""

from __future__ import annotations

import pytest

from pipelines.data import loader as loading
from pipelines.data.batch import Position
from pipelines.data.loader import EpochStream, LocalOpener, Plans
from pipelines.data.shard_set import ShardSet, read_shard_set
from pipelines.transforms.rows import rows_of
from tests.small_runs import small_run
from tests.small_sets import WorkerOpener, reading_of, write_set

RUN = small_run("none")
NUM_ROWS, NUM_EPOCHS, UNITS_PER_EPOCH = 37, 5, 2  # and four batches an epoch


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    folder = tmp_path_factory.mktemp("stream") / "set"
    return read_shard_set(write_set(folder, groups=[[5, 9], [7], [1, 11, 4]]))


def stream_of(
    opener: WorkerOpener,
    shards: ShardSet,
    *,
    start: Position | None = None,
    is_planner: bool = True,
) -> EpochStream:
    return EpochStream(
        Plans(shards=shards, run=RUN, train=True),
        opener=opener,
        is_planner=is_planner,
        start=start or Position(),
        num_epochs=NUM_EPOCHS,
    )


def read_all(stream: EpochStream) -> dict[int, list[int]]:
    """Read to the end, telling the stream of every batch as a supply does."""
    found: dict[int, list[int]] = {}
    for table in stream.tables():
        epoch, batch = (table[name][0].as_py() for name in ("epoch", "first_batch"))
        found.setdefault(epoch, []).extend(rows_of(table).ids.tolist())
        for at in range(len(table["share_rows"][0])):
            stream.reached(epoch, batch + at)
    return found


@pytest.mark.parametrize("num_units", [1, 2, 3, 7, 1000])
def test_every_epoch_is_whole_wherever_segments_end(
    shards: ShardSet, monkeypatch: pytest.MonkeyPatch, num_units: int
) -> None:
    monkeypatch.setattr(loading, "_UNITS_PER_SEGMENT", num_units)
    opener = WorkerOpener(shards)
    found = read_all(stream_of(opener, shards))
    assert list(found) == list(range(NUM_EPOCHS))
    for ids in found.values():
        assert sorted(ids) == list(range(NUM_ROWS))
    assert len({tuple(ids) for ids in found.values()}) == NUM_EPOCHS
    sizes = [len(units) for units in opener.opened]
    assert sum(sizes) == UNITS_PER_EPOCH * NUM_EPOCHS
    assert set(sizes[:-1]) <= {num_units}


def test_the_next_segment_is_opened_in_the_last_tenth_of_one(
    shards: ShardSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "_UNITS_PER_SEGMENT", 4)  # two epochs
    opener = WorkerOpener(shards)
    stream = stream_of(opener, shards)
    # The last of four units begins with batch 2 of epoch 1.
    for epoch, batch in ((0, 0), (0, 3), (1, 0), (1, 1)):
        stream.reached(epoch, batch)
        assert len(opener.opened) == 1
    stream.reached(1, 2)
    assert len(opener.opened) == 2
    stream.reached(2, 0)
    assert len(opener.opened) == 2
    stream.reached(3, 3)
    assert [{unit.epoch for unit in units} for units in opener.opened] == [
        {0, 1},
        {2, 3},
        {4},
    ]
    stream.reached(4, 3)
    assert len(opener.opened) == 3


def test_workers_that_do_not_plan_open_as_often(
    shards: ShardSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "_UNITS_PER_SEGMENT", 3)
    openers = WorkerOpener(shards), WorkerOpener(shards)
    streams = [
        stream_of(opener, shards, is_planner=at == 0)
        for at, opener in enumerate(openers)
    ]
    for epoch in range(NUM_EPOCHS):
        for batch in range(4):
            for stream in streams:
                stream.reached(epoch, batch)
            assert len(openers[0].opened) == len(openers[1].opened)
    assert openers[1].opened == [[]] * 4


@pytest.mark.parametrize("num_units", [1, 3, 1000])
@pytest.mark.parametrize("batch", [0, 1, 2, 3])
def test_a_stream_goes_on_where_the_position_points(
    shards: ShardSet, monkeypatch: pytest.MonkeyPatch, batch: int, num_units: int
) -> None:
    monkeypatch.setattr(loading, "_UNITS_PER_SEGMENT", num_units)
    whole = read_all(stream_of(WorkerOpener(shards), shards))
    start = Position(epoch=2, batch=batch)
    rest = read_all(stream_of(WorkerOpener(shards), shards, start=start))
    assert list(rest) == [2, 3, 4]
    assert rest[2] == whole[2][batch * RUN.data.batch_size :]
    assert {epoch: rest[epoch] for epoch in (3, 4)} == {e: whole[e] for e in (3, 4)}


def test_a_finished_run_has_nothing_to_read(shards: ShardSet) -> None:
    opener = WorkerOpener(shards)
    start = Position(epoch=NUM_EPOCHS)
    assert read_all(stream_of(opener, shards, start=start)) == {}
    assert opener.opened == []


def test_evaluation_has_its_own_batches_in_the_order_of_the_files(
    shards: ShardSet,
) -> None:
    plan = Plans(shards=shards, run=RUN, train=False).plan(3)
    assert plan.shape.batch_size == RUN.data.eval_batch_size
    slices = [piece for unit in plan.units() for piece in unit.slices]
    assert [piece.first_id for piece in slices] == sorted(s.first_id for s in slices)
    assert {unit.epoch for unit in plan.units()} == {3}
    assert {unit.row_key for unit in plan.units()} == {None}


def test_a_local_opener_reads_what_was_prepared(shards: ShardSet) -> None:
    opener = LocalOpener(reading_of(shards))
    plan = Plans(shards=shards, run=RUN, train=True).plan(0)
    opener.prepare(lambda: list(plan.units()))
    ids = [i for table in opener.open() for i in rows_of(table).ids.tolist()]
    assert sorted(ids) == list(range(NUM_ROWS))
