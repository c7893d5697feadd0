"""Labels of a held-out set: its classes, ImageNet-ReaL's; the names of its images."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.config import Validation
from pipelines.data.epoch_plan import Slice
from pipelines.data.reading import read_shard
from pipelines.data.shard_set import SCHEMA, ShardSet, check_labels, read_shard_set
from pipelines.storage.filesystem import open_filesystem
from pipelines.storage.path import StoragePath
from pipelines.storage.retry import answering

OWN_SET = "val"
"""Prefix of metrics, and folder of pictures, of a run's own held-out set."""
# The images of ImageNet's validation set go by their number, whoever has packed them:
# folders and further words may stand around it.
_NUMBER = re.compile(r"ILSVRC2012_val_(\d{8})(?!\d)")
# ReaL's annotators kept nine of ten of the original labels; in another order of the
# classes one in a thousand would agree.
_LEAST_AGREEMENT = 0.5
_COLUMNS = ("key", "label")
# Each asks for a file or a row group and waits; a disk answers before the next asks.
_NUM_THREADS = 16


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Held-out set as a model of some classes is evaluated on it."""

    name: str
    """Name that its metrics are told apart by; empty for the run's own set."""
    shards: ShardSet
    classes: tuple[str, ...]
    """The model's names of the set's classes, by the set's labels."""
    columns: tuple[int, ...] | None
    """The model's number of each class of the set; None where they are the same."""
    real: np.ndarray | None = None
    """int32 (rows, n): ReaL labels of each row, as the set numbers classes, -1 where
    it has no more; None where they are not wanted."""

    @property
    def prefix(self) -> str:
        """Prefix of its metrics, without the slash."""
        return f"{OWN_SET}_{self.name}" if self.name else OWN_SET


def held_out(
    shards: ShardSet,
    *,
    classes: Sequence[str],
    name: str = "",
    real_labels: str = "",
) -> HeldOut:
    """Match a set with a model's classes, and with ReaL labels if they are given.

    Args:
        classes: The model's.
        real_labels: ImageNet-ReaL's real.json, a file or an address.

    Raises ValueError where the classes can't be matched, and where the labels are not
    those of the set's images.
    """
    columns = match_classes(shards.classes, classes=classes, shown=shards.address)
    names = tuple(classes if columns is None else [classes[at] for at in columns])
    real = None
    if real_labels:
        real = _real_of(shards, path=real_labels, columns=columns, num=len(classes))
    return HeldOut(name=name, shards=shards, classes=names, columns=columns, real=real)


def held_out_of(
    validation: Validation, *, val: ShardSet | None, classes: Sequence[str]
) -> tuple[HeldOut, ...]:
    """Describe all sets that a run is evaluated on, its own first.

    ReaL labels go with the run's own; without one there is none. Raises ValueError as
    `read_shard_set` and `held_out`.
    """
    if val is None:
        return ()
    own = held_out(val, classes=classes, real_labels=validation.real_labels)
    others = [
        held_out(read_shard_set(address), classes=classes, name=name)
        for name, address in validation.also_at.items()
    ]
    return (own, *others)


def match_classes(
    names: Sequence[str], *, classes: Sequence[str], shown: str
) -> tuple[int, ...] | None:
    """Map a set's classes to the model's; None where they are the same.

    A set's classes are some of the model's by name, as ImageNet-A's 200, or numbers of
    them counted from 0, as the folders of ImageNetV2. Raises ValueError, naming the
    set, where they are neither.
    """
    if tuple(names) == tuple(classes):
        return None
    places = {name: at for at, name in enumerate(classes)}
    unknown = [name for name in names if name not in places]
    numbers = [int(name) for name in names if re.fullmatch(r"[0-9]{1,9}", name)]
    if unknown:
        is_numbered = len(set(numbers)) == len(names) and max(numbers) < len(classes)
        if not is_numbered:
            raise ValueError(
                f"expected shards of the model's {len(classes)} classes or of some of "
                f"them, by name or by number from 0, got {shown!r} with {len(names)} "
                f"classes, of which {len(unknown)} are others, such as {unknown[0]!r}; "
                "write them with sovit-shards --classes of the training set"
            )
        return tuple(numbers)
    return tuple(places[name] for name in names)


def read_real(path: str) -> list[list[int]]:
    """Read ImageNet-ReaL's labels: a list for each image, in the images' order.

    Raises ValueError where the file is not there or holds anything else.
    """
    place = StoragePath(path)
    try:
        with answering():
            found = json.loads(place.read())
    except (OSError, ValueError) as error:
        raise _no_real(path, got=str(error)) from error
    if not isinstance(found, list) or not all(map(_is_numbers, found)):
        raise _no_real(path, got="JSON of something else")
    return found


def _is_numbers(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int for item in value)


def _no_real(path: str, *, got: str) -> ValueError:
    return ValueError(
        "expected ImageNet-ReaL's real.json, a list of lists of class numbers, got "
        f"{str(StoragePath(path))!r} ({got}); fetch it from "
        "google-research/reassessed-imagenet"
    )


def _real_of(
    shards: ShardSet, *, path: str, columns: Sequence[int] | None, num: int
) -> np.ndarray:
    """Return each row's ReaL labels as the set numbers classes: int32 (rows, n)."""
    by_image = read_real(path)
    keys, labels = read_keys(shards)
    numbers = [_image_number(key, shards=shards) for key in keys]
    if max(numbers) >= len(by_image):
        raise _no_real(path, got=f"{len(by_image)} lists for image {max(numbers) + 1}")
    lists = [by_image[number] for number in numbers]
    if any(not 0 <= label < num for of in lists for label in of):
        raise ValueError(
            f"expected ReaL labels from 0 to {num - 1}, one of the model's classes "
            f"each, got others in {path!r}: they are for ImageNet-1K's 1,000 classes, "
            "in the order of their WordNet ids; leave them out for a model of other "
            "classes"
        )
    real = np.full((len(lists), max(map(len, lists), default=0) or 1), -1, np.int32)
    for row, of in enumerate(lists):
        real[row, : len(of)] = of
    if columns is not None:
        # One more for -1, which maps to itself.
        place = np.full(num + 1, -1, np.int32)
        place[list(columns)] = np.arange(len(columns))
        real = place[real]
    _check_order(real, labels, path=path, shards=shards)
    return real


def _image_number(key: str, *, shards: ShardSet) -> int:
    found = _NUMBER.search(key)
    if found is None or int(found[1]) == 0:
        raise ValueError(
            "expected ImageNet's validation images for ReaL labels, keys with "
            f"ILSVRC2012_val_00000001 and so on, got {shards.address!r} with {key!r}; "
            "write the shards from the files by their own names, or leave the labels "
            "out"
        )
    return int(found[1]) - 1


def _check_order(
    real: np.ndarray, labels: np.ndarray, *, path: str, shards: ShardSet
) -> None:
    has_any = (real >= 0).any(axis=1)
    agreeing = (real == labels[:, None]).any(axis=1)
    if agreeing.sum() < _LEAST_AGREEMENT * has_any.sum():
        raise ValueError(
            f"expected ReaL labels that mostly hold the images' own, got {path!r} "
            f"where {agreeing.sum():,} of {has_any.sum():,} do; the classes of "
            f"{shards.address!r} are in another order than ImageNet's, by WordNet id"
        )


def read_keys(shards: ShardSet) -> tuple[list[str], np.ndarray]:
    """Read the keys and the labels (int64) of a whole set, by row id.

    Of the shards only these two columns are read: some ten bytes an image.

    Raises ValueError, naming the shard, where it is gone or damaged, and where the
    store does not answer.
    """
    with ThreadPoolExecutor(_NUM_THREADS) as pool, answering():
        tables = list(
            pool.map(lambda path: _read(shards, path=path), shards.groups.paths)
        )
    keys = [key for table in tables for key in table["key"].to_pylist()]
    labels = np.concatenate([table["label"].to_numpy() for table in tables])
    if len(keys) != shards.groups.total_rows:
        raise ValueError(
            f"expected the {shards.groups.total_rows} rows that the footers of "
            f"{shards.address!r} told of, got {len(keys)}; the shards changed since"
        )
    return keys, labels.astype(np.int64)


def with_labels(shards: ShardSet) -> ShardSet:
    """Read the labels of a set, as small as they are, into it."""
    _, labels = read_keys(shards)
    labels = labels.astype(np.min_scalar_type(len(shards.classes)))
    return replace(shards, labels=labels)


def keys_of(shards: ShardSet, row_ids: Sequence[int]) -> dict[int, str]:
    """Read the keys of a few rows: of each row group that holds one, the column."""
    ends = np.cumsum(shards.groups.num_rows, dtype=np.int64)
    rows = sorted(set(row_ids))
    by_group = itertools.groupby(
        rows, lambda row: int(np.searchsorted(ends, row, side="right"))
    )
    asked = [(shards.groups.slice_of(group), list(of)) for group, of in by_group]

    def read(item: tuple[Slice, list[int]]) -> list[str]:
        part, of_group = item
        table = _read(shards, path=part.path, place=part.place)
        return [table["key"][row - part.first_id].as_py() for row in of_group]

    with ThreadPoolExecutor(_NUM_THREADS) as pool, answering():
        found = list(itertools.chain.from_iterable(pool.map(read, asked)))
    return dict(zip(rows, found, strict=True))


def _read(shards: ShardSet, *, path: str, place: int | None = None) -> pa.Table:
    """Read keys and labels of a file, or of one of its row groups."""
    filesystem, _ = open_filesystem(shards.address)

    def read() -> pa.Table:
        with pq.ParquetFile(path, filesystem=filesystem, pre_buffer=True) as file:
            if place is None:
                table = file.read(columns=list(_COLUMNS))
            else:
                table = file.read_row_group(place, columns=list(_COLUMNS))
        table = table.select(_COLUMNS)
        # Exchanged since its footer was checked: see `data.reading`.
        if table.schema.types != [SCHEMA.field(name).type for name in _COLUMNS]:
            raise pa.ArrowInvalid("its columns are of other types than a shard's")
        return table

    table = read_shard(read, address=shards.address, path=path)
    check_labels(table["label"], num_classes=len(shards.classes), path=path)
    return table
