"""Shard sets in a bucket: written, finished, refused and read as those on a path."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.data.epoch_plan import plan_epoch
from pipelines.data.reading import read_rows
from pipelines.data.shard_set import read_shard_set
from pipelines.shards.command import Arguments, make_shards
from pipelines.shards.planning import Done
from pipelines.storage.path import StoragePath
from tests.bucket_sets import NUM_SHARDS, ROOT, content, make, upload, write_images
from tests.s3_server import BUCKET, Line, s3_server
from tests.small_sets import jpeg, reading_of, write_set


@pytest.fixture
def line() -> Iterator[Line]:
    with s3_server() as line:
        yield line


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return write_images(tmp_path / "images")


def all_rows(address: str) -> pa.Table:
    shards = read_shard_set(address)
    plan = plan_epoch(shards.groups, batch_size=4, shuffle_rows=8, shuffle=False)
    reading = reading_of(shards)
    return pa.concat_tables([read_rows(u, reading=reading) for u in plan.units()])


@pytest.mark.parametrize("scheme", ["s3", "memory"])
def test_a_set_in_a_bucket_is_the_set_on_a_path(
    scheme: str, line: Line, images: Path, tmp_path: Path
) -> None:
    out = f"{scheme}://{BUCKET}/{tmp_path.name}/train"
    local = str(tmp_path / "train")
    assert make(images, local).done == make(images, out).done
    assert content(StoragePath(out)) == content(StoragePath(local))
    there, here = read_shard_set(out), read_shard_set(local)
    assert there.digest == here.digest
    assert there.classes == here.classes
    assert all_rows(out).equals(all_rows(local))
    assert make(images, out).was_finished
    assert make(images, f"{out}2", classes=out).done.num_rows == 24


def test_a_unit_asks_for_its_shards_beside_each_other(
    line: Line, tmp_path: Path
) -> None:
    local = write_set(tmp_path / "set", groups=[[2]] * 6)
    far = upload(Path(local), f"{ROOT}/set")
    plan = plan_epoch(read_shard_set(far).groups, batch_size=12, shuffle_rows=12)
    (unit,) = plan.units()
    assert len({item.path for item in unit.slices}) == 6
    reading = reading_of(read_shard_set(far))
    line.latency_s, line.most_at_once = 0.2, 0
    rows = read_rows(unit, reading=reading)
    assert line.most_at_once > 2
    planned = [i + s.first_id for s in unit.slices for i in range(s.start, s.stop)]
    assert rows["row_id"].to_pylist() == planned


class Stopped(Exception):
    """Stands for the end of the process."""


@pytest.mark.parametrize("num", [0, 2])
def test_stopped_work_goes_on_in_a_bucket(
    line: Line, images: Path, tmp_path: Path, num: int
) -> None:
    def stopping(task, indices: Sequence[int]) -> Iterator[Done]:
        for place, index in enumerate(indices):
            if place == num:
                raise Stopped
            yield task(index)

    out = f"{ROOT}/train"
    make(images, str(tmp_path / "train"))
    arguments = Arguments(images, out, num_shards=NUM_SHARDS)
    with pytest.raises(Stopped):
        make_shards(arguments, execute=stopping)
    names = [entry.base_name for entry in StoragePath(out).entries()]
    assert len([name for name in names if name.endswith(".parquet")]) == num
    # What a store keeps of another writer, and of another run.
    StoragePath(out).within("train-00002-of-00003.parquet").write(b"PAR1 cut")
    line.taken()
    assert not make(images, out).was_finished
    written = {request for request in line.taken() if request.startswith("PUT")}
    kept = [f"PUT /{BUCKET}/train/train-{i:05d}-of-00003.parquet" for i in range(num)]
    assert not written & set(kept)
    assert content(StoragePath(out)) == content(StoragePath(str(tmp_path / "train")))


def test_nothing_but_our_own_set_is_replaced(line: Line, images: Path) -> None:
    out = f"{ROOT}/train"
    make(images, out)
    with pytest.raises(ValueError, match=r"seed was 0, is 1\. .*--overwrite"):
        make(images, out, seed=1)
    make(images, out, seed=1, overwrite=True)
    assert read_shard_set(out).groups.total_rows == 24
    other = StoragePath(f"{ROOT}/other")
    other.within("thesis.txt").write(b"precious")
    with pytest.raises(ValueError, match="not a set that this command began"):
        make(images, str(other), overwrite=True)
    with pytest.raises(
        ValueError, match=r"folder to write to, got .*, a file; name another"
    ):
        make(images, str(other.within("thesis.txt")))
    assert content(other) == {"thesis.txt": b"precious"}


def test_unpacking_needs_a_folder_of_its_own(line: Line, tmp_path: Path) -> None:
    rows = [{"bytes": jpeg(number), "path": f"{number}.jpg"} for number in range(9)]
    source = tmp_path / "source.parquet"
    pq.write_table(pa.table({"image": rows, "label": [0, 1, 2] * 3}), source)
    with pytest.raises(ValueError, match="--scratch"):
        make(source, f"{ROOT}/train")
    scratch = tmp_path / "scratch"
    make(source, f"{ROOT}/train", scratch=scratch)
    make(source, str(tmp_path / "train"))
    assert content(StoragePath(f"{ROOT}/train")) == content(
        StoragePath(str(tmp_path / "train"))
    )
    assert list(scratch.iterdir()) == []


@pytest.mark.parametrize("num_shards", [1, 4])
def test_a_set_of_n_shards_is_read_by_n_and_3_requests(
    line: Line, tmp_path: Path, num_shards: int
) -> None:
    address = upload(
        Path(write_set(tmp_path / "set", groups=[[3, 4, 2]] * num_shards)),
        f"{ROOT}/set",
    )
    line.taken()
    read_shard_set(address)
    requests = line.taken()
    assert len(requests) == num_shards + 3
    # These have statistics; without, each row group's labels are a request more.
    assert sum(".parquet" in request for request in requests) == num_shards


def test_labels_without_statistics_are_read_where_that_is_cheap(
    line: Line, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = f"{ROOT}/train"
    for path in images.rglob("*.jpg"):  # so large that groups are not read together
        path.write_bytes(jpeg(int(path.stem), size=(300, 200)))
    make(images, out, rows_per_group=4)
    line.taken()
    num_groups = int(read_shard_set(out).groups.num_groups.sum())
    assert len(line.taken()) == NUM_SHARDS + 3 + num_groups
    monkeypatch.setattr("pipelines.data.shard_set._MAX_LABEL_REQUESTS", 5)
    read_shard_set(out)
    assert len(line.taken()) == NUM_SHARDS + 3


@pytest.mark.parametrize("label", [-1, 3, None])
@pytest.mark.parametrize("has_statistics", [True, False])
def test_a_label_outside_the_classes_is_named(
    line: Line, tmp_path: Path, label: int | None, has_statistics: bool
) -> None:
    folder = Path(write_set(tmp_path / "set", groups=[[3, 4]]))
    path = folder / "set-00000-of-00001.parquet"
    rows = pq.read_table(path)
    labels = pa.array([0] * 6 + [label], pa.int64())
    rows = rows.set_column(1, "label", labels)
    pq.write_table(rows, path, row_group_size=4, write_statistics=has_statistics)
    upload(folder, f"{ROOT}/set")
    with pytest.raises(ValueError, match=f"{ROOT}/set/{path.name}: .*labels 0 to 2"):
        read_shard_set(f"{ROOT}/set")


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_a_source_in_a_bucket_is_that_on_a_path(
    kind: str, line: Line, images: Path, tmp_path: Path
) -> None:
    source, far = images, f"{ROOT}/{tmp_path.name}/images"
    if kind == "tar":
        source = tmp_path / "images.tar"
        with tarfile.open(source, "w") as tar:
            tar.add(images, arcname=".")
        far = f"{far}.tar"
        StoragePath(far).write(source.read_bytes())
    else:
        for file in images.rglob("*.jpg"):
            StoragePath(f"{far}/{file.relative_to(images)}").write(file.read_bytes())
    here, there = tmp_path / "a" / "set", tmp_path / "b" / "set"
    assert make(source, str(here)).done == make(far, str(there)).done
    shards = [path.name for path in here.glob("*.parquet")]
    assert len(shards) == NUM_SHARDS
    for name in shards:
        assert (there / name).read_bytes() == (here / name).read_bytes()
