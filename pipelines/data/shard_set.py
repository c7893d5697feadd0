"""Write shards of images; read a set's Parquet footers, or say why it is unusable.

A set is a folder of Parquet files `NAME-00000-of-00008.parquet` with the columns of
`SCHEMA` and a `classes.json`, a list of class names whose place is the label. A
file's footer says how many rows each of its row groups holds; there is no other index.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from pipelines.data.epoch_plan import GroupTable
from pipelines.storage.path import StoragePath
from pipelines.storage.retry import answering, retrying

CLASSES_FILE = "classes.json"
SCHEMA = pa.schema(
    [
        ("image", pa.binary()),  # the encoded file, byte for byte
        ("label", pa.int64()),
        ("key", pa.string()),  # unique within the set
        ("width", pa.int32()),  # stored pixels, before any EXIF rotation
        ("height", pa.int32()),
    ]
)
# A row group is what training reads and shuffles at once: large enough for one disk
# request to be worth it, small enough that a few of them fit a shuffle buffer.
BYTES_PER_GROUP = 4 * 2**20
ROWS_PER_GROUP = 64
T = TypeVar("T")
# pyarrow's S3 client keeps 25 connections.
_NUM_THREADS = 24
_MAX_WAITING = 4096
_COUNT = re.compile(r"-of-(\d+)\.parquet$")
# Past this many files, or row groups in a bucket, labels are checked as they are read.
_MAX_LABEL_REQUESTS = 2000


def shard_name(name: str, *, index: int, num_shards: int) -> str:
    """Return the name of one file of a set, such as `train-00002-of-00008.parquet`."""
    return f"{name}-{index:05d}-of-{num_shards:05d}.parquet"


def cut_evenly(num: int, *, num_parts: int) -> list[int]:
    """Return the `num_parts + 1` bounds that cut `num` rows into nearly equal parts."""
    return [num * part // num_parts for part in range(num_parts + 1)]


def group_bounds(
    sizes_bytes: Sequence[int],
    *,
    rows_per_group: int = ROWS_PER_GROUP,
    bytes_per_group: int = BYTES_PER_GROUP,
) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of the row groups: full by rows or by bytes, never empty."""
    start, filled_bytes = 0, 0
    for row, size_bytes in enumerate(sizes_bytes):
        is_full = row - start == rows_per_group
        if is_full or (row > start and filled_bytes + size_bytes > bytes_per_group):
            yield start, row
            start, filled_bytes = row, 0
        filled_bytes += size_bytes
    if len(sizes_bytes) > start:
        yield start, len(sizes_bytes)


def write_shard(
    file: StoragePath | Path,
    *,
    rows: pa.Table,
    rows_per_group: int = ROWS_PER_GROUP,
    bytes_per_group: int = BYTES_PER_GROUP,
    image_compression: str = "none",
    metadata: dict[str, str] | None = None,
) -> None:
    """Write one file of a set, whole or not at all.

    Args:
        file: The file's final place; replaced if it is there.
        rows: A table with the columns of `SCHEMA`.
        rows_per_group: Most rows of a row group.
        bytes_per_group: Most image bytes of a row group, unless one image is larger.
        image_compression: Parquet codec of the image column. Photographs do not
            shrink; thousands of tiny JPEGs do, since their headers are alike.
        metadata: Text kept in the footer.
    """
    rows = rows.select(SCHEMA.names).cast(SCHEMA)
    sizes_bytes = pc.call_function("binary_length", [rows["image"]]).to_pylist()
    # Statistics and dictionaries of images would only fatten the footer and the pages.
    settings: dict[str, Any] = {
        "compression": dict.fromkeys(SCHEMA.names, "zstd")
        | {"image": image_compression},
        "use_dictionary": ["label"],
        "write_statistics": False,
        "store_schema": False,
    }
    with (
        _place(file).writing() as path,
        pq.ParquetWriter(path, SCHEMA, **settings) as writer,
    ):
        for start, stop in group_bounds(
            sizes_bytes, rows_per_group=rows_per_group, bytes_per_group=bytes_per_group
        ):
            group = rows.slice(start, stop - start).combine_chunks()
            writer.write_table(group, row_group_size=len(group))
        if metadata:
            writer.add_key_value_metadata(metadata)


def write_json(file: StoragePath | Path, *, value: object) -> None:
    """Write a JSON file whole or not at all."""
    text = json.dumps(value, indent=1, ensure_ascii=False)
    _place(file).write(f"{text}\n".encode())


def _place(file: StoragePath | Path) -> StoragePath:
    return file if isinstance(file, StoragePath) else StoragePath(str(file))


@dataclass(frozen=True, kw_only=True)
class ShardSet:
    """Shard set: files, classes, row groups, and a digest of them all."""

    address: str
    classes: tuple[str, ...]
    groups: GroupTable
    digest: str
    labels: np.ndarray | None = None
    """Class of each row, read where epochs are balanced."""


def read_shard_set(address: str) -> ShardSet:
    """Read the footers, classes and label range of a set.

    A bucket is asked n + 3 times for a set of n shards, and once more for each further
    thousand; for labels that no statistics cover, 2000 times more at most.

    Raises ValueError, naming the file, where the folder is missing or empty, a footer
    is damaged, columns are not those of a shard, a label lies outside the classes, or
    the store does not answer.
    """
    with answering():
        return _read_shard_set(StoragePath(address))


def _read_shard_set(place: StoragePath) -> ShardSet:
    files = _list_files(place)
    paths = tuple(item.path for item in files)
    _check_whole(paths, place=place)
    classes = _read_classes(place.within(CLASSES_FILE))
    read = functools.partial(
        _rows_of_groups, place=place, num_files=len(files), num_classes=len(classes)
    )
    rows: list[list[int]] = []
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        # In parts: what waits in a pool takes 2 kB each, and there may be 10^5.
        for start in range(0, len(files), _MAX_WAITING):
            rows += pool.map(read, files[start : start + _MAX_WAITING])
    groups = _group_table(paths, rows=rows)
    if groups.total_rows == 0:
        raise ValueError(
            f"expected rows in {str(place)!r}, got {len(paths)} empty shards"
        )
    return ShardSet(
        address=place.address,
        classes=classes,
        groups=groups,
        digest=_digest(files, rows=rows, classes=classes),
    )


def _list_files(place: StoragePath) -> list[pafs.FileInfo]:
    try:
        found = place.entries()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ValueError(
            f"expected a folder of shards, got {str(place)!r}, which is not there; "
            "write one with sovit-shards or set --data.train and --data.val"
        ) from error
    files = [item for item in found if item.path.endswith(".parquet")]
    if not files:
        raise ValueError(
            f"expected *.parquet in {str(place)!r}, got an empty set; write it with "
            "sovit-shards"
        )
    return files


def check_labels(labels: pa.ChunkedArray, *, num_classes: int, path: str) -> None:
    """Raise ValueError, naming the shard, where a label is not in the classes."""
    if len(labels) == 0:
        return
    found = pc.call_function("min_max", [labels]).as_py()
    if labels.null_count or found["min"] < 0 or found["max"] >= num_classes:
        raise ValueError(
            f"{path}: expected labels 0 to {num_classes - 1} ({CLASSES_FILE} names "
            f"{num_classes} classes), got {found['min']} to {found['max']} and "
            f"{labels.null_count} missing; write the shards again with sovit-shards"
        )


def _check_whole(paths: Sequence[str], *, place: StoragePath) -> None:
    """Reject a set with missing files: their names say how many there are."""
    counts = {int(found[1]) for path in paths if (found := _COUNT.search(path))}
    if counts and counts != {len(paths)}:
        wanted = " or ".join(str(count) for count in sorted(counts))
        raise ValueError(
            f"expected {wanted} shards in {str(place)!r} by their names, got "
            f"{len(paths)}; run sovit-shards again to finish the set, or remove what "
            "is not of it"
        )


def _read_classes(file: StoragePath) -> tuple[str, ...]:
    try:
        classes = json.loads(file.read())
    except ConnectionError:
        raise
    except (OSError, ValueError) as error:
        raise ValueError(
            f"expected {file} with a JSON list of class names, got {error}; write the "
            "set with sovit-shards"
        ) from error
    is_list = isinstance(classes, list) and len(classes) > 0
    if not is_list or not all(isinstance(name, str) for name in classes):
        raise ValueError(
            f"{file}: expected a JSON list of class names, got {classes!r:.60}; write "
            "the set with sovit-shards"
        )
    return tuple(classes)


def _rows_of_groups(
    info: pafs.FileInfo, *, place: StoragePath, num_files: int, num_classes: int
) -> list[int]:
    """Read a shard's footer, and check its labels where that is cheap.

    Returns the rows of each row group; raises ValueError as `read_shard_set`.
    """
    name = str(place.within(info.base_name))
    filesystem, _ = place.open()
    # Told the size, a fragment needs one request: the file's end.
    fragment = ds.ParquetFileFormat().make_fragment(
        info.path, filesystem=filesystem, file_size=info.size
    )
    footer = _fetched(lambda: _metadata(fragment), name=name, part="footer")
    _check_columns(footer, name=name)
    # On a path the labels themselves are read, which shows damage too.
    labels = _known_labels(footer) if place.is_remote else None
    # A bucket is asked for each row group's labels, a path for each file's.
    num_requests = num_files * (footer.num_row_groups if place.is_remote else 1)
    if labels is None and num_requests <= _MAX_LABEL_REQUESTS:
        labels = _fetched(lambda: _labels(fragment), name=name, part="labels")
    if labels is not None:
        check_labels(labels, num_classes=num_classes, path=name)
    return [footer.row_group(at).num_rows for at in range(footer.num_row_groups)]


def _known_labels(footer: pq.FileMetaData) -> pa.ChunkedArray | None:
    """Return the minimum and maximum label of each row group from its statistics.

    None where one has none.
    """
    column = footer.schema.names.index("label")
    found: list[int | None] = []
    for at in range(footer.num_row_groups):
        known = footer.row_group(at).column(column).statistics
        if known is None or not known.has_min_max or not known.has_null_count:
            return None
        found += [known.min, known.max, *[None] * known.null_count]
    return pa.chunked_array([found], pa.int64())


def _fetched(function: Callable[[], T], *, name: str, part: str) -> T:
    try:
        return retrying(function, address=name)
    except ConnectionError:
        raise
    except (OSError, pa.ArrowInvalid) as error:
        raise ValueError(
            f"{name}: expected a Parquet shard, got one whose {part} can't be read "
            f"({error}); write it again with sovit-shards"
        ) from error


def _metadata(fragment: ds.ParquetFileFragment) -> pq.FileMetaData:
    try:
        return fragment.metadata
    except pa.ArrowInvalid:
        raise
    except (TypeError, ValueError):
        # Of types that Ray registers with Arrow: it would name a switch that unpickles.
        raise pa.ArrowInvalid("a column's type is not one of Arrow's own") from None


def _labels(fragment: ds.ParquetFileFragment) -> pa.ChunkedArray:
    return fragment.to_table(columns=["label"], use_threads=False)["label"]


def _check_columns(footer: pq.FileMetaData, *, name: str) -> None:
    columns = footer.schema.to_arrow_schema()
    wrong = [
        f"{field.name}: {field.type}"
        for field in SCHEMA
        if field.name not in columns.names
        or columns.field(field.name).type != field.type
    ]
    if wrong:
        raise ValueError(
            f"{name}: expected the columns {', '.join(wrong)}, got "
            f"{', '.join(columns.names)}; write the shard with sovit-shards"
        )


def _group_table(paths: tuple[str, ...], *, rows: Sequence[list[int]]) -> GroupTable:
    return GroupTable(
        paths=paths,
        num_groups=np.array([len(of_file) for of_file in rows], dtype=np.int32),
        num_rows=np.fromiter(itertools.chain.from_iterable(rows), dtype=np.int32),
    )


def _digest(
    files: Sequence[pafs.FileInfo],
    *,
    rows: Sequence[list[int]],
    classes: Sequence[str],
) -> str:
    """Hash names, sizes, row counts and classes: what changes when a set changes."""
    # The JSON of [[[name, size, counts], ...], classes], a shard at a time.
    digest = hashlib.sha256(b"[[")
    for at, (item, counts) in enumerate(zip(files, rows, strict=True)):
        line = json.dumps([item.base_name, item.size, counts])
        digest.update(f"{', ' if at else ''}{line}".encode())
    digest.update(f"], {json.dumps(list(classes))}]".encode())
    return digest.hexdigest()[:16]
