"""Format of a shard set, which `sovit-shards` writes and training reads.

A set is a folder of Parquet files `NAME-00000-of-00008.parquet` with the columns of
`SCHEMA` and a `classes.json`, a list of class names whose place is the label. A
file's footer says how many rows each of its row groups holds; there is no other index.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.storage.path import StoragePath

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
