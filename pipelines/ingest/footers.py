"""Read what a shard set holds from its Parquet footers, or say why it can't be used."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from pipelines.ingest.plan import GroupTable
from pipelines.shards.format import CLASSES_FILE, SCHEMA

_NUM_THREADS = 16
_COUNT = re.compile(r"-of-(\d+)\.parquet$")
# Past this many files the labels are checked only as they are read.
_MAX_FILES_CHECKED = 2000


@dataclass(frozen=True, kw_only=True)
class ShardSet:
    """Describe a shard set: files, classes, row groups, and a digest of them all."""

    address: str
    classes: tuple[str, ...]
    groups: GroupTable
    digest: str


def open_place(address: str) -> tuple[pafs.FileSystem, str]:
    """Find the filesystem and path of a folder or a bucket address."""
    if "://" in address:
        return pafs.FileSystem.from_uri(address)
    return pafs.LocalFileSystem(), address


def read_shard_set(address: str) -> ShardSet:
    """Read the footers, classes and label range of a set.

    Raises ValueError, naming the file, where the folder is missing or empty, a footer
    is damaged, columns are not those of a shard, or a label lies outside the classes.
    """
    filesystem, root = open_place(address)
    info = filesystem.get_file_info(root)
    if info.type != pafs.FileType.Directory:
        raise ValueError(
            f"wanted a folder of shards, came {address!r}, which is not there; "
            "write one with sovit-shards or set --data.train and --data.val"
        )
    found = filesystem.get_file_info(pafs.FileSelector(root))
    files = sorted(
        (item for item in found if item.path.endswith(".parquet")),
        key=lambda item: item.path,
    )
    if not files:
        raise ValueError(
            f"wanted *.parquet in {address!r}, came an empty set; "
            "write it with sovit-shards"
        )
    paths = tuple(item.path for item in files)
    _check_whole(paths, address=address)
    classes = _read_classes(filesystem, f"{root}/{CLASSES_FILE}")
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        rows = list(pool.map(lambda path: _group_rows(filesystem, path), paths))
        if len(paths) <= _MAX_FILES_CHECKED:
            labels = pool.map(lambda path: _labels(filesystem, path), paths)
            for path, of_file in zip(paths, labels, strict=True):
                check_labels(of_file, num_classes=len(classes), path=path)
    groups = _group_table(paths, rows=rows)
    if groups.total_rows == 0:
        raise ValueError(f"wanted rows in {address!r}, came {len(paths)} empty shards")
    return ShardSet(
        address=address,
        classes=classes,
        groups=groups,
        digest=_digest(files, rows=rows, classes=classes),
    )


def check_labels(labels: pa.ChunkedArray, *, num_classes: int, path: str) -> None:
    """Raise ValueError, naming the shard, where a label is not in the classes."""
    if len(labels) == 0:
        return
    found = pc.call_function("min_max", [labels]).as_py()
    if labels.null_count or found["min"] < 0 or found["max"] >= num_classes:
        raise ValueError(
            f"{path}: wanted labels 0 to {num_classes - 1} ({CLASSES_FILE} names "
            f"{num_classes} classes), came {found['min']} to {found['max']} and "
            f"{labels.null_count} missing; write the shards again with sovit-shards"
        )


def _check_whole(paths: Sequence[str], *, address: str) -> None:
    """Refuse a set of which files are missing: their names say how many there are."""
    counts = {int(found[1]) for path in paths if (found := _COUNT.search(path))}
    if counts and counts != {len(paths)}:
        wanted = " or ".join(str(count) for count in sorted(counts))
        raise ValueError(
            f"wanted {wanted} shards in {address!r} by their names, came {len(paths)}; "
            "run sovit-shards again to finish the set, or remove what is not of it"
        )


def _read_classes(filesystem: pafs.FileSystem, path: str) -> tuple[str, ...]:
    try:
        with filesystem.open_input_stream(path) as stream:
            classes = json.loads(stream.read())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"wanted {path} with a JSON list of class names, came {error}; "
            "write the set with sovit-shards"
        ) from error
    is_list = isinstance(classes, list) and len(classes) > 0
    if not is_list or not all(isinstance(name, str) for name in classes):
        raise ValueError(
            f"{path}: wanted a JSON list of class names, came {classes!r:.60}; "
            "write the set with sovit-shards"
        )
    return tuple(classes)


def _group_rows(filesystem: pafs.FileSystem, path: str) -> list[int]:
    try:
        footer = pq.read_metadata(path, filesystem=filesystem)
    except (OSError, pa.ArrowInvalid) as error:
        raise ValueError(
            f"wanted a Parquet shard, came {path}, whose footer can't be read "
            f"({error}); write it again with sovit-shards"
        ) from error
    columns = footer.schema.to_arrow_schema()
    wrong = [
        f"{field.name}: {field.type}"
        for field in SCHEMA
        if field.name not in columns.names
        or columns.field(field.name).type != field.type
    ]
    if wrong:
        raise ValueError(
            f"{path}: wanted the columns {', '.join(wrong)}, came "
            f"{', '.join(columns.names)}; write the shard with sovit-shards"
        )
    return [footer.row_group(at).num_rows for at in range(footer.num_row_groups)]


def _labels(filesystem: pafs.FileSystem, path: str) -> pa.ChunkedArray:
    try:
        with pq.ParquetFile(path, filesystem=filesystem) as file:
            return file.read(columns=["label"])["label"]
    except (OSError, pa.ArrowInvalid) as error:
        raise ValueError(
            f"{path}: its labels can't be read ({error}); write the shard again"
        ) from error


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
    """Digest names, sizes, row counts and classes: what changes when a set changes."""
    lines = [
        [item.base_name, item.size, counts]
        for item, counts in zip(files, rows, strict=True)
    ]
    content = json.dumps([lines, list(classes)])
    return hashlib.sha256(content.encode()).hexdigest()[:16]
