"""Footers: what a set holds, or one line that names the file and the remedy."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.data.shard_set import check_labels, read_shard_set
from tests.small_sets import write_set

GROUPS = [[3, 4], [], [5]]
FIRST = "set-00000-of-00003.parquet"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(write_set(tmp_path / "set", groups=GROUPS))


def test_a_set_is_read_by_file_and_place(folder: Path) -> None:
    found = read_shard_set(str(folder))
    assert found.classes == ("c0", "c1", "c2")
    assert [Path(path).name for path in found.groups.paths] == [
        f"set-{number:05d}-of-00003.parquet" for number in range(3)
    ]
    assert found.groups.num_groups.tolist() == [2, 0, 1]
    assert found.groups.num_rows.tolist() == [3, 4, 5]
    assert found.groups.total_rows == 12


def test_the_digest_changes_when_the_set_changes(folder: Path, tmp_path: Path) -> None:
    digest = read_shard_set(str(folder)).digest
    moved = shutil.copytree(folder, tmp_path / "elsewhere")
    assert read_shard_set(str(moved)).digest == digest
    others = [
        write_set(tmp_path / "cut", groups=[[3], [4], [5]]),
        write_set(tmp_path / "order", groups=[[4, 3], [], [5]]),
        write_set(tmp_path / "classes", groups=GROUPS, num_classes=4),
        write_set(tmp_path / "pixels", groups=GROUPS, size=(20, 12)),
    ]
    digests = {digest, *(read_shard_set(other).digest for other in others)}
    assert len(digests) == 5


def test_a_set_with_a_missing_file_is_refused(folder: Path) -> None:
    (folder / FIRST).unlink()
    refused(folder, saying=("3 shards", "got 2"))


def refused(folder: Path, *, saying: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="expected") as caught:
        read_shard_set(str(folder))
    for words in (*saying, "sovit-shards"):
        assert words in str(caught.value)


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    refused(tmp_path / "no", saying=(str(tmp_path / "no"), "--data.train"))
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file", saying=("file",))


def test_a_folder_without_shards_is_refused(tmp_path: Path) -> None:
    refused(tmp_path, saying=(str(tmp_path), "*.parquet"))
    empty = write_set(tmp_path / "empty", groups=[[], []])
    with pytest.raises(ValueError, match="2 empty shards"):
        read_shard_set(empty)


@pytest.mark.parametrize("cut", ["footer", "half", "all"])
def test_a_damaged_footer_is_named(folder: Path, cut: str) -> None:
    path = folder / FIRST
    content = path.read_bytes()
    kept = {"footer": content[:-2], "half": content[: len(content) // 2], "all": b""}
    path.write_bytes(kept[cut])
    refused(folder, saying=(FIRST, "footer"))


def test_wrong_columns_are_named(folder: Path) -> None:
    rows = pq.read_table(folder / FIRST)
    pq.write_table(
        rows.rename_columns(["picture", *rows.column_names[1:]]), folder / FIRST
    )
    refused(folder, saying=(FIRST, "image: binary", "picture"))
    labels = rows["label"].cast(pa.int32())
    pq.write_table(rows.set_column(1, "label", labels), folder / FIRST)
    refused(folder, saying=(FIRST, "label: int64"))


@pytest.mark.parametrize("label", [-1, 3, None])
def test_a_label_outside_the_classes_is_named(folder: Path, label: int | None) -> None:
    rows = pq.read_table(folder / FIRST)
    labels = pa.array([0] * 6 + [label], pa.int64())
    pq.write_table(rows.set_column(1, "label", labels), folder / FIRST)
    refused(folder, saying=(FIRST, "labels 0 to 2", "classes.json"))


def test_labels_of_no_rows_are_fine() -> None:
    check_labels(pa.chunked_array([], pa.int64()), num_classes=2, path="x")


@pytest.mark.parametrize("content", [None, "", "[", "{}", "[]", "[1, 2, 3]", "\udcff"])
def test_missing_or_bad_classes_are_named(folder: Path, content: str | None) -> None:
    path = folder / "classes.json"
    path.unlink()
    if content is not None:
        path.write_bytes(content.encode(errors="surrogateescape"))
    refused(folder, saying=("classes.json",))


def test_damaged_labels_are_named(folder: Path) -> None:
    path = folder / FIRST
    column = pq.read_metadata(path).row_group(0).column(1)
    start = column.dictionary_page_offset or column.data_page_offset
    content = bytearray(path.read_bytes())
    content[start : start + 12] = b"\xff" * 12
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{FIRST}.*labels can't be read"):
        read_shard_set(str(folder))
    assert json.loads((folder / "classes.json").read_text())
