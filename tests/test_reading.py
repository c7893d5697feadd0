"""Share tables: exact nesting, no copies, and the same batches at any world size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.data import reading
from pipelines.data.epoch_plan import EpochPlan, plan_epoch
from pipelines.data.reading import read_rows, share_tables
from pipelines.data.shard_set import ShardSet, read_shard_set
from pipelines.transforms.rows import image_views, rows_of
from tests.small_sets import jpeg, reading_of, worker_tables, write_set

GROUPS = [[5, 9], [7], [], [1, 11, 4]]
NUM_ROWS = 37


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    folder = tmp_path_factory.mktemp("reading") / "set"
    return read_shard_set(write_set(folder, groups=GROUPS))


def plan_of(
    shards: ShardSet, *, shuffle_rows: int = 16, shuffle: bool = True
) -> EpochPlan:
    return plan_epoch(
        shards.groups,
        batch_size=8,
        shuffle_rows=shuffle_rows,
        seed=3,
        epoch=2,
        shuffle=shuffle,
    )


def batch_ids(
    plan: EpochPlan, *, shards: ShardSet, num_workers: int, start_batch: int = 0
) -> dict[int, list[int]]:
    """Give each global batch's ids as a sequence over the workers in order."""
    found: dict[int, list[int]] = {}
    for worker in range(num_workers):
        units = plan.units(start_batch=start_batch)
        for table in worker_tables(
            units, shards=shards, num_workers=num_workers, worker=worker
        ):
            ids = rows_of(table).ids.tolist()
            sizes = table["share_rows"][0].as_py()
            assert sum(sizes) == len(ids)
            bounds = np.cumsum([0, *sizes])
            for at in range(len(sizes)):
                share = ids[bounds[at] : bounds[at + 1]]
                number = table["first_batch"][0].as_py() + at
                found.setdefault(number, []).extend(share)
    return found


def test_rows_come_in_the_order_of_the_plan_with_their_own_ids(
    shards: ShardSet,
) -> None:
    seen = []
    for unit in plan_of(shards).units():
        rows = read_rows(unit, reading=reading_of(shards))
        ids = rows["row_id"].to_pylist()
        planned = [np.arange(s.start, s.stop) + s.first_id for s in unit.slices]
        assert ids == np.concatenate(planned).tolist()
        assert rows["key"].to_pylist() == [f"k{i}" for i in ids]
        assert rows["label"].to_pylist() == [i % 3 for i in ids]
        assert rows["image"].to_pylist() == [jpeg(i) for i in ids]
        seen += ids
    assert sorted(seen) == list(range(NUM_ROWS))
    paths = [piece.path for unit in plan_of(shards).units() for piece in unit.slices]
    assert paths != sorted(paths)


def test_evaluation_reads_in_the_order_of_the_files(shards: ShardSet) -> None:
    plan = plan_of(shards, shuffle=False)
    ids = batch_ids(plan, shards=shards, num_workers=3)
    assert [i for batch in ids.values() for i in batch] == list(range(NUM_ROWS))


@pytest.mark.parametrize("num_workers", range(2, 9))
def test_a_batch_holds_the_same_rows_at_any_number_of_workers(
    shards: ShardSet, num_workers: int
) -> None:
    plan = plan_of(shards)
    alone = batch_ids(plan, shards=shards, num_workers=1)
    assert [len(alone[number]) for number in range(5)] == [8, 8, 8, 8, 5]
    assert batch_ids(plan, shards=shards, num_workers=num_workers) == alone
    rest = batch_ids(plan, shards=shards, num_workers=num_workers, start_batch=3)
    assert rest == {number: alone[number] for number in (3, 4)}


@pytest.mark.parametrize("num_workers", [1, 2, 3, 5])
def test_repeats_come_in_one_batch_and_a_pass_takes_as_many_epochs(
    shards: ShardSet, num_workers: int
) -> None:
    """Three epochs of batches of four images, each three times, make the set."""
    seen: list[int] = []
    for epoch in range(3):
        plan = plan_epoch(
            shards.groups,
            batch_size=12,
            shuffle_rows=24,
            seed=3,
            epoch=epoch,
            num_repeats=3,
        )
        batches: dict[int, list[tuple[int, int]]] = {}
        for worker in range(num_workers):
            for table in worker_tables(
                plan.units(), shards=shards, num_workers=num_workers, worker=worker
            ):
                rows, start = rows_of(table), 0
                for at, size in enumerate(table["share_rows"][0].as_py()):
                    part = rows.cut(start, start + size)
                    start += size
                    pairs = zip(part.ids.tolist(), part.repeats.tolist(), strict=True)
                    number = table["first_batch"][0].as_py() + at
                    batches.setdefault(number, []).extend(pairs)
                    keys = [f"k{i}" for i in part.ids]
                    assert part.keys.to_pylist() == keys
        assert len(batches) == plan.shape.num_batches == 4 if epoch == 0 else 3
        for pairs in batches.values():
            ids = sorted({row for row, _ in pairs})
            assert sorted(pairs) == [(row, time) for row in ids for time in range(3)]
            seen += ids
        assert all(len(batches[number]) == 12 for number in range(3))
    assert sorted(seen) == list(range(NUM_ROWS))


def test_shares_of_a_batch_differ_by_one_row_at_most(shards: ShardSet) -> None:
    units = list(plan_of(shards).units())
    shares, tables = np.zeros((7, 1)), []
    for unit in units:
        tables = list(share_tables(unit, reading=reading_of(shards, num_workers=7)))
        assert len(tables) == 7
        shares = np.array([table["share_rows"][0].as_py() for table in tables])
        assert (shares.max(axis=0) - shares.min(axis=0) <= 1).all()
        assert shares.sum(axis=0).tolist() == tables[0]["batch_rows"][0].as_py()
        assert [t["ends_epoch"][0].as_py() for t in tables] == [unit.ends_epoch] * 7
        assert {table["epoch"][0].as_py() for table in tables} == {2}
    # The last unit holds five rows: two of seven workers get an empty share.
    assert (shares[:, -1] == 0).sum() == 2
    empty = tables[int(shares[:, -1].argmin())]
    assert len(empty) == 1
    assert len(rows_of(empty).views) == 0


def test_a_unit_becomes_tables_within_a_size(
    shards: ShardSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(shards, shuffle_rows=100)
    whole = batch_ids(plan, shards=shards, num_workers=2)
    unit = plan.unit(0)
    images = read_rows(unit, reading=reading_of(shards))["image"].to_pylist()
    share_bytes = sum(map(len, images)) // 5 // 2
    monkeypatch.setattr(reading, "MAX_SHARE_BYTES", int(2.5 * share_bytes))
    tables = list(share_tables(unit, reading=reading_of(shards, num_workers=2)))
    sizes = [len(table["share_rows"][0]) for table in tables]
    assert sizes == [2, 2, 2, 2, 1, 1]
    assert [t["ends_epoch"][0].as_py() for t in tables] == [False] * 4 + [True] * 2
    assert batch_ids(plan, shards=shards, num_workers=2) == whole


def test_views_lie_in_the_tables_own_memory(shards: ShardSet) -> None:
    unit = plan_of(shards).unit(0)
    sent = list(share_tables(unit, reading=reading_of(shards, num_workers=2)))[1]
    # As it arrives: out of a buffer that another process wrote.
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, sent.schema) as writer:
        writer.write_table(sent)
    buffer = sink.getvalue()
    table = pa.ipc.open_stream(buffer).read_all()
    rows = rows_of(table)
    for view, number in zip(rows.views, rows.ids, strict=True):
        address = view.__array_interface__["data"][0]
        assert buffer.address <= address
        assert address + view.nbytes <= buffer.address + buffer.size
        assert view.tobytes() == jpeg(int(number))
    assert rows.labels.tolist() == [i % 3 for i in rows.ids]
    assert {*rows.widths, *rows.heights} == {16, 12}


def test_views_of_a_slice_and_of_nothing() -> None:
    values = pa.array([b"ab", b"", b"cde", b"f"], pa.large_binary())
    assert [v.tobytes() for v in image_views(values[1:])] == [b"", b"cde", b"f"]
    assert image_views(values[:0]) == []
    assert image_views(pa.array([], pa.large_binary())) == []


def damaged_copy(shards: ShardSet, folder: Path) -> Path:
    write_set(folder, groups=GROUPS)
    return folder / Path(shards.groups.paths[1]).name


def fails_naming(path: Path, *, saying: str) -> None:
    found = read_shard_set(str(path.parent))
    plan = plan_of(found)
    with pytest.raises(ValueError, match=saying) as caught:
        batch_ids(plan, shards=found, num_workers=2)
    assert str(path) in str(caught.value)


def test_a_damaged_body_is_named(shards: ShardSet, tmp_path: Path) -> None:
    path = damaged_copy(shards, tmp_path / "set")
    column = pq.read_metadata(path).row_group(0).column(0)
    content = bytearray(path.read_bytes())
    start = column.dictionary_page_offset or column.data_page_offset
    content[start : start + 40] = b"\xff" * 40
    path.write_bytes(content)
    fails_naming(path, saying="sovit-shards")


def test_a_shard_that_went_or_changed_is_named(
    shards: ShardSet, tmp_path: Path
) -> None:
    path = damaged_copy(shards, tmp_path / "set")
    found = read_shard_set(str(path.parent))
    whole = pq.read_table(path)
    wrong_label = whole.set_column(1, "label", pa.array([9] * 7, pa.int64()))
    for content in (whole[:3], whole[:0], whole.drop_columns(["label"]), wrong_label):
        pq.write_table(content, path)
        with pytest.raises(ValueError, match=path.name):
            batch_ids(plan_of(found), shards=found, num_workers=1)
    path.unlink()
    with pytest.raises(ValueError, match=path.name):
        batch_ids(plan_of(found), shards=found, num_workers=1)
