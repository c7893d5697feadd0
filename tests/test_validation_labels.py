"""Labels of a held-out set: its classes, ImageNet-ReaL's, and the keys of its rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.config import Validation
from pipelines.data.shard_set import SCHEMA, ShardSet, read_shard_set
from pipelines.evaluation.held_out import (
    held_out,
    held_out_of,
    keys_of,
    match_classes,
    read_keys,
    read_real,
)
from tests.small_sets import write_set

GROUPS = [[5, 9], [7], [1, 11, 4]]
NUM_ROWS = 37
CLASSES = ("c0", "c1", "c2", "d")
# Which of ImageNet's images a row is: another order, and more images than rows.
NUMBERS = [(7 * row) % 41 for row in range(NUM_ROWS)]


def rename(address: str, *, key: Callable[[int], str]) -> None:
    """Write the keys of a set anew, by row."""
    first = 0
    for path in sorted(Path(address).glob("*.parquet")):
        with pq.ParquetFile(path) as file:
            tables = [file.read_row_group(at) for at in range(file.num_row_groups)]
        with pq.ParquetWriter(path, SCHEMA) as writer:
            for table in tables:
                keys = pa.array([key(first + at) for at in range(len(table))])
                first += len(table)
                place = table.schema.get_field_index("key")
                writer.write_table(table.set_column(place, "key", keys))


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """Write a set with the names of ImageNet's validation images, as tars have them."""
    address = write_set(tmp_path_factory.mktemp("labels") / "val", groups=GROUPS)
    rename(address, key=lambda row: f"ILSVRC2012_val_{NUMBERS[row] + 1:08d}.JPEG")
    return read_shard_set(address)


def real_json(folder: Path, lists: object) -> str:
    path = folder / "real.json"
    path.write_text(json.dumps(lists))
    return str(path)


def lists_of(of_row: Callable[[int], list[int]]) -> list[list[int]]:
    """Give a list for each image; those of no row have one that is wrong."""
    lists: list[list[int]] = [[3]] * 41
    for row, number in enumerate(NUMBERS):
        lists[number] = of_row(row)
    return lists


def some(row: int) -> list[int]:
    return [] if row % 5 == 0 else [3, row % 3] if row % 2 else [row % 3]


def test_real_labels_go_to_the_rows_of_their_images(
    shards: ShardSet, tmp_path: Path
) -> None:
    path = real_json(tmp_path, lists_of(some))
    found = held_out(shards, classes=CLASSES, real_labels=path)
    assert found.real is not None
    assert found.real.shape == (NUM_ROWS, 2)
    assert found.columns == (0, 1, 2)
    # The model's fourth class is none of the set's: its label goes.
    for row, labels in enumerate(found.real.tolist()):
        wanted = [label for label in some(row) if label < 3]
        assert [label for label in labels if label >= 0] == wanted
    # They number a model's classes, of another order here, and become the set's.
    other = tmp_path / "other"
    other.mkdir()
    path = real_json(other, lists_of(lambda row: [3 - label for label in some(row)]))
    again = held_out(shards, classes=CLASSES[::-1], real_labels=path)
    assert again.columns == (3, 2, 1)
    assert again.classes == ("c0", "c1", "c2")
    assert again.real is not None
    np.testing.assert_array_equal(again.real, found.real)


@pytest.mark.parametrize(
    "key", ["n01440764/ILSVRC2012_val_{}.JPEG", "val-3/ILSVRC2012_val_{}_n0144.jpg"]
)
def test_other_packers_names_are_read_too(tmp_path: Path, key: str) -> None:
    address = write_set(tmp_path / "val", groups=[[4]])
    rename(address, key=lambda row: key.format(f"{4 - row:08d}"))
    path = real_json(tmp_path, [[0], [2], [1], [0]])
    found = held_out(
        read_shard_set(address), classes=("c0", "c1", "c2"), real_labels=path
    )
    assert found.real is not None
    assert found.real[:, 0].tolist() == [0, 1, 2, 0]


@pytest.mark.parametrize(
    ("lists", "said"),
    [
        ({"1": [1]}, "JSON of something else"),
        ([[0.5]], "JSON of something else"),
        ([[True]], "JSON of something else"),
        ([[0]] * 30, r"30 lists for image 4\d"),
        (lists_of(lambda row: [4]), "labels from 0 to 3"),
        (lists_of(lambda row: [-1]), "labels from 0 to 3"),
        (lists_of(lambda row: [(row + 1) % 3]), "mostly hold .* 0 of 37 do"),
    ],
)
def test_labels_of_something_else_are_refused(
    shards: ShardSet, tmp_path: Path, lists: Any, said: str
) -> None:
    path = real_json(tmp_path, lists)
    with pytest.raises(ValueError, match=said):
        held_out(shards, classes=CLASSES, real_labels=path)


def test_no_labels_and_no_imagenet_are_refused(
    shards: ShardSet, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"real\.json, a list of lists"):
        read_real(str(tmp_path / "none.json"))
    (tmp_path / "no.json").write_text("no json")
    with pytest.raises(ValueError, match=r"real\.json, a list of lists"):
        read_real(str(tmp_path / "no.json"))
    other = read_shard_set(write_set(tmp_path / "other", groups=[[3]]))
    path = real_json(tmp_path, lists_of(some))
    with pytest.raises(ValueError, match=r"ILSVRC2012_val_00000001 .*'k0'"):
        held_out(other, classes=other.classes, real_labels=path)


def test_keys_and_labels_are_in_the_order_of_the_rows(shards: ShardSet) -> None:
    keys, labels = read_keys(shards)
    assert keys == [f"ILSVRC2012_val_{number + 1:08d}.JPEG" for number in NUMBERS]
    assert labels.tolist() == [row % 3 for row in range(NUM_ROWS)]
    rows = [36, 0, 4, 5, 13, 14, 21, 22, 32, 33, 0]
    assert keys_of(shards, rows) == {row: keys[row] for row in rows}
    assert keys_of(shards, []) == {}


def test_a_shard_that_is_damaged_or_gone_is_named(tmp_path: Path) -> None:
    shards = read_shard_set(write_set(tmp_path / "set", groups=[[3], [3]]))
    second = Path(shards.groups.paths[1])
    whole = second.read_bytes()
    second.write_bytes(whole[: len(whole) // 2])
    for read in (read_keys, lambda of: keys_of(of, [4])):
        with pytest.raises(ValueError, match=second.name):
            read(shards)
    second.unlink()
    with pytest.raises(ValueError, match=second.name):
        read_keys(shards)
    # One row more than when its footer was read.
    write_set(tmp_path / "other", groups=[[3], [4]])
    second.write_bytes((tmp_path / "other" / second.name).read_bytes())
    with pytest.raises(ValueError, match=r"the 6 rows .* got 7"):
        read_keys(shards)


@pytest.mark.parametrize(
    ("names", "columns"),
    [
        (("n1", "n2", "n3", "n4"), None),
        (("n3", "n1"), (2, 0)),
        (("n4", "n3", "n2", "n1"), (3, 2, 1, 0)),
        # Folders sort as text.
        (("0", "1", "2", "3"), (0, 1, 2, 3)),
        (("0", "3"), (0, 3)),
    ],
)
def test_classes_match_by_name_or_else_by_number(
    names: tuple[str, ...], columns: tuple[int, ...] | None
) -> None:
    classes = ("n1", "n2", "n3", "n4")
    assert match_classes(names, classes=classes, shown="x") == columns


def test_names_that_are_numbers_are_names_first() -> None:
    classes = tuple(sorted(str(at) for at in range(12)))  # 0, 1, 10, 11, 2, ...
    assert match_classes(("2", "10"), classes=classes, shown="x") == (4, 2)
    folders = tuple(sorted(str(at) for at in range(1000)))
    found = match_classes(folders, classes=[f"n{at}" for at in range(1000)], shown="x")
    assert found is not None
    assert found[:4] == (0, 1, 10, 100)
    assert sorted(found) == list(range(1000))


@pytest.mark.parametrize(
    "names", [("n1", "x"), ("0", "4"), ("0", "00"), ("0", "n1"), ("-1",), ("²",)]
)
def test_other_classes_are_refused_by_name(names: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=r"got 's3://a' with .* --classes") as caught:
        match_classes(names, classes=("n1", "n2", "n3", "n4"), shown="s3://a")
    assert any(repr(name) in str(caught.value) for name in names)


def test_a_runs_sets_are_its_own_and_those_by_name(
    shards: ShardSet, tmp_path: Path
) -> None:
    other = write_set(tmp_path / "other", groups=[[3]])
    validation = Validation(
        real_labels=real_json(tmp_path, lists_of(some)), also=(f"v2={other}",)
    )
    own, v2 = held_out_of(validation, val=shards, classes=CLASSES)
    assert (own.prefix, v2.prefix) == ("val", "val_v2")
    assert own.real is not None
    assert v2.real is None
    assert np.sum(v2.shards.groups.num_rows) == 3
