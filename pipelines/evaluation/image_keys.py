"""Read the names of a set's images without the images: keys by row, and labels."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.data.epoch_plan import Slice
from pipelines.data.reading import read_shard
from pipelines.data.shard_format import SCHEMA
from pipelines.data.shard_set import ShardSet, check_labels
from pipelines.storage.filesystem import open_filesystem
from pipelines.storage.retry import answering

_COLUMNS = ("key", "label")
# Each asks for a file or a row group and waits; a disk answers before the next asks.
_NUM_THREADS = 16


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
