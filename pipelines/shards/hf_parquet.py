"""Lists and unpacks Parquet files as Hugging Face keeps image sets.

One image cannot be read out of a Parquet row group alone, and a shuffle wants images of
all files in each shard. So each file is first unpacked, a row group at a time, into a
plain file of bytes beside an index; for the time of the work that takes the disk space
of the set once more, and the memory of one row group.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.files import partial_name
from pipelines.shards.listing import Builder, Listing, resolve_texts


def list_parquet(paths: Sequence[Path], *, classes: Sequence[str] | None) -> Listing:
    """List Parquet files with the columns image {bytes, path} and label (int64).

    Class names are `classes`, or those of the Hugging Face metadata in the schema.
    Keys are the paths, if all are there and differ, or else FILE#ROW.

    Raises:
        ValueError: A file is not Parquet, lacks a column, or has a label outside.
    """
    _refuse_mixed_splits(paths)
    builder = Builder("parquet")
    tables = [_read_labels(path) for path in paths]
    keys = [key for table in tables for key in table["path"].to_pylist()]
    are_keys = None not in keys and len(set(keys)) == len(keys)
    for path, table in zip(paths, tables, strict=True):
        builder.containers.append(str(path))
        columns = [table[n].to_pylist() for n in ("path", "label", "size_bytes")]
        for row, (key, label, size_bytes) in enumerate(zip(*columns, strict=True)):
            builder.add(
                key if are_keys else f"{path.name}#{row}",
                name=str(label),
                offset=row,
                size_bytes=size_bytes,
            )
    named = list(classes) if classes is not None else _names_in(paths[0])
    ordered, labels = resolve_texts(builder.names(), classes=named)
    return builder.finish(ordered, labels=labels)


def _refuse_mixed_splits(paths: Sequence[Path]) -> None:
    matches = [re.match(r"(.+?)-\d+-of-\d+", path.name) for path in paths]
    splits = sorted({match[1] for match in matches if match})
    if len(splits) > 1:
        raise ValueError(
            f"{paths[0].parent} holds the splits {', '.join(splits)}: name one of "
            f"them, for example '{paths[0].parent / splits[0]}-*.parquet'."
        )


def _open(path: Path) -> pq.ParquetFile:
    try:
        file = pq.ParquetFile(path)
        schema = file.schema_arrow
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path} is not a Parquet file: {error}") from None
    except (TypeError, ValueError):  # of types that Ray registered with Arrow
        raise ValueError(f"{path} has a column of a type not Arrow's own.") from None
    if "image" not in schema.names or "label" not in schema.names:
        raise ValueError(
            f"Wanted the columns image and label in {path}, got {schema.names}."
        )
    if not pa.types.is_integer(schema.field("label").type):
        raise ValueError(f"Wanted whole numbers as labels in {path}.")
    _check_types(schema, path=path)
    return file


def _check_types(schema: pa.Schema, *, path: Path) -> None:
    """Refuse other than bytes and text: reading a type of Ray's own would unpickle."""
    image = schema.field("image").type
    parts = {"bytes": image}
    if pa.types.is_struct(image):
        parts = {field.name: field.type for field in image}
    found = {
        "bytes": parts.get("bytes"),
        "path": parts.get("path", pa.null()),
        "key": schema.field("key").type if "key" in schema.names else pa.null(),
    }
    texts = (pa.null(), pa.string(), pa.large_string(), pa.string_view())
    wanted = {"bytes": (pa.binary(), pa.large_binary(), pa.binary_view())}
    for name, kind in found.items():
        if kind not in wanted.get(name, texts):
            raise ValueError(
                f"Wanted images as bytes, paths and keys as text in {path}, got {name} "
                f"as {kind}."
            )


def _image_column(file: pq.ParquetFile) -> str:
    is_struct = pa.types.is_struct(file.schema_arrow.field("image").type)
    return "image.bytes" if is_struct else "image"


def _read_labels(path: Path) -> pa.Table:
    with _open(path) as file:
        image = _image_column(file)
        table = file.read(columns=["image.path", "key", "label"])
        sizes = _mean_sizes(file, column=image)
    if "image" in table.column_names:
        paths = table["image"].combine_chunks().field("path")
    else:
        paths = table["key"] if "key" in table.column_names else [None] * len(table)
    return pa.table(
        {
            "path": pa.chunked_array([paths]) if isinstance(paths, pa.Array) else paths,
            "label": table["label"],
            "size_bytes": sizes,
        }
    )


def _mean_sizes(file: pq.ParquetFile, *, column: str) -> np.ndarray:
    sizes, metadata = [], file.metadata
    for group in range(metadata.num_row_groups):
        chunks = metadata.row_group(group)
        for place in range(chunks.num_columns):
            chunk = chunks.column(place)
            if chunk.path_in_schema == column:
                mean = chunk.total_uncompressed_size // max(1, chunks.num_rows)
                sizes.append(np.full(chunks.num_rows, mean, dtype=np.int64))
    return np.concatenate(sizes) if sizes else np.zeros(0, dtype=np.int64)


def _names_in(path: Path) -> list[str] | None:
    metadata = pq.read_schema(path).metadata or {}
    try:
        info = json.loads(metadata.get(b"huggingface", b"{}"))
        names = info["info"]["features"]["label"]["names"]
    except (ValueError, KeyError, TypeError):
        return None
    return [str(name) for name in names]


def unpack(path: Path, *, blob: Path) -> None:
    """Write a file's images one after the other, and BLOB.npy with their bounds.

    Does nothing where both are there already.

    Args:
        path: The Parquet file.
        blob: The file to write; its index holds num_rows + 1 byte offsets.
    """
    index = blob.with_suffix(".npy")
    if blob.exists() and index.exists():
        return
    sizes = [0]
    partial, partial_index = (Path(partial_name(str(p))) for p in (blob, index))
    with _open(path) as file, partial.open("wb") as out:
        column = _image_column(file)
        for group in range(file.num_row_groups):
            images = file.read_row_group(group, columns=[column])["image"]
            for chunk in images.chunks:
                values = chunk.field("bytes") if column == "image.bytes" else chunk
                for value in values:
                    sizes.append(out.write(value.as_buffer() or b""))
    with partial_index.open("wb") as out:
        np.save(out, np.cumsum(sizes, dtype=np.int64))
    os.replace(partial_index, index)
    os.replace(partial, blob)
