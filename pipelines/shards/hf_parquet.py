"""List and unpack Parquet files as Hugging Face stores image sets.

One image cannot be read out of a Parquet row group alone, and a shuffle wants images of
all files in each shard. So each file is first unpacked, a row group at a time, into a
plain file of bytes beside an index; for the time of the work that takes the disk space
of the set once more, and the memory of one row group.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from pipelines.data.shard_set import CLASSES_FILE
from pipelines.shards.classes import (
    MAX_OWN_LABELS,
    Numbering,
    label_text,
    parse_classes,
    plain,
    refuse_captions,
    resolve_names,
    resolve_texts,
)
from pipelines.shards.listing import USUAL_FIELDS, Builder, Fields, Listing
from pipelines.shards.stored import base_name, child, open_stored, read_text
from pipelines.storage.path import StoragePath, partial_name

_TEXTS = (pa.string(), pa.large_string(), pa.string_view())
_BYTES = (pa.binary(), pa.large_binary(), pa.binary_view())
_DEFAULT = Fields(image="image", label="label")


def columns(fields: Fields) -> Fields:
    """Return the names of the two columns that are read."""
    return Fields(
        image=fields.image or _DEFAULT.image, label=fields.label or _DEFAULT.label
    )


def list_parquet(
    paths: Sequence[str], *, numbering: Numbering, fields: Fields = USUAL_FIELDS
) -> Listing:
    """List Parquet files with an image column {bytes, path} or bytes, and a label's.

    A label is a number or a name. Class names are those of the Hugging Face metadata
    in the schema, or of the shard set that the files are; where `numbering` has
    classes too, labels go to them by name. Keys are the paths, if all are there and
    differ, or else FILE#ROW. A row without a label is left out.

    Raises:
        ValueError: A file is not Parquet, lacks a column, disagrees with another on
            the class names, or has a label outside.
    """
    builder = Builder("parquet", layout="Parquet files", fields=fields)
    fields = columns(fields)
    tables = [_read_labels(path, fields=fields) for path in paths]
    own = _own_names(paths, fields=fields)
    keys = [key for table in tables for key in table["path"].to_pylist()]
    are_keys = None not in keys and len(set(keys)) == len(keys)
    for path, table in zip(paths, tables, strict=True):
        builder.containers.append(path)
        encoded = table["label"].combine_chunks().dictionary_encode()
        names = [label_text(value) for value in encoded.dictionary.to_pylist()]
        codes, sizes = encoded.indices.to_pylist(), table["size_bytes"].to_pylist()
        keys_here = table["path"].to_pylist() if are_keys else []
        for row, (code, size_bytes) in enumerate(zip(codes, sizes, strict=True)):
            key = keys_here[row] if are_keys else f"{base_name(path)}#{row}"
            name = None if code is None else names[code]
            if name is None:
                builder.skip(key, source=f"{path}, row {row}", reason="no label")
                continue
            builder.add(key, name=name, offset=row, size_bytes=size_bytes)
    distinct, num_images, most = builder.names(), len(builder.keys), MAX_OWN_LABELS
    with builder.explaining():
        refuse_captions(distinct, num_images=num_images, numbering=numbering, most=most)
        if own is not None and tables[0]["label"].type in _TEXTS:
            chosen = numbering if numbering.classes else Numbering(classes=own)
            ordered, labels = resolve_names(distinct, numbering=chosen)
        else:
            ordered, labels = resolve_texts(distinct, numbering=numbering, own=own)
    return builder.finish(ordered, labels=labels)


@contextlib.contextmanager
def _open(path: str, *, fields: Fields) -> Iterator[pq.ParquetFile]:
    assert fields.image is not None
    assert fields.label is not None
    with open_stored(path) as stored:
        try:
            file = pq.ParquetFile(stored)
            schema = file.schema_arrow
        except pa.ArrowInvalid as error:
            raise ValueError(f"{path} is not a Parquet file: {error}") from None
        except (TypeError, ValueError):  # of types that Ray registered with Arrow
            raise ValueError(
                f"{path} has a column of a type not Arrow's own."
            ) from None
        missing = {fields.image, fields.label} - set(schema.names)
        if missing:
            raise ValueError(
                f"expected the columns {fields.image} and {fields.label} in {path}, "
                f"got {', '.join(schema.names)}; name them by --image-field and "
                "--label-field"
            )
        _check_types(schema, path=path, fields=fields)
        yield file


def _check_types(schema: pa.Schema, *, path: str, fields: Fields) -> None:
    """Reject columns of other types: reading a type of Ray's own would unpickle."""
    image = schema.field(fields.image).type
    parts = {"bytes": image}
    if pa.types.is_struct(image):
        parts = {field.name: field.type for field in image}
    if parts.get("bytes") == pa.null():
        raise _paths_alone(path)
    found = {
        "bytes": parts.get("bytes"),
        "path": parts.get("path", pa.null()),
        "key": schema.field("key").type if "key" in schema.names else pa.null(),
    }
    wanted = {"bytes": _BYTES}
    for name, kind in found.items():
        if kind not in wanted.get(name, (pa.null(), *_TEXTS)):
            raise ValueError(
                f"expected images as bytes, paths and keys as text in {path}, got "
                f"{name} as {kind}; name the right --image-field"
            )
    label = schema.field(fields.label).type
    if pa.types.is_dictionary(label):
        label = label.value_type
    is_number = pa.types.is_integer(label) or pa.types.is_floating(label)
    if not is_number and label not in (*_TEXTS, pa.bool_()):
        raise ValueError(
            f"expected numbers or names as labels in {path}, got {fields.label} as "
            f"{label}; name the right --label-field"
        )


def _paths_alone(path: str) -> ValueError:
    return ValueError(
        f"expected the bytes of images in {path}, got their paths alone; write the "
        "files with the images in them (datasets' embed_table_storage does), or name "
        "the folder of the images as SOURCE"
    )


def _image_column(file: pq.ParquetFile, *, fields: Fields) -> str:
    assert fields.image is not None
    is_struct = pa.types.is_struct(file.schema_arrow.field(fields.image).type)
    return f"{fields.image}.bytes" if is_struct else fields.image


def _read_labels(path: str, *, fields: Fields) -> pa.Table:
    with _open(path, fields=fields) as file:
        image = _image_column(file, fields=fields)
        if _is_all_null(file, column=image):
            raise _paths_alone(path)
        table = file.read(columns=[f"{fields.image}.path", "key", fields.label])
        sizes = _mean_sizes(file, column=image)
    if fields.image in table.column_names:
        paths = table[fields.image].combine_chunks().field("path")
    else:
        paths = table["key"] if "key" in table.column_names else [None] * len(table)
    label = table[fields.label]
    if pa.types.is_dictionary(label.type):
        label = label.cast(label.type.value_type)
    return pa.table(
        {
            "path": pa.chunked_array([paths]) if isinstance(paths, pa.Array) else paths,
            "label": label,
            "size_bytes": sizes,
        }
    )


def _is_all_null(file: pq.ParquetFile, *, column: str) -> bool:
    metadata = file.metadata
    num_null = 0
    for group in range(metadata.num_row_groups):
        chunks = metadata.row_group(group)
        for place in range(chunks.num_columns):
            chunk = chunks.column(place)
            if chunk.path_in_schema == column and chunk.statistics is not None:
                num_null += chunk.statistics.null_count or 0
    return 0 < metadata.num_rows == num_null


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


def _own_names(paths: Sequence[str], *, fields: Fields) -> list[str] | None:
    """Read the class names that come with the files, which must agree on them."""
    found = {path: _names_in(path, fields=fields) for path in paths}
    named = {path: names for path, names in found.items() if names is not None}
    if named:
        first, names = next(iter(named.items()))
        for path, others in found.items():
            if others != names:
                raise ValueError(
                    f"expected the same class names in all files, got {_short(names)} "
                    f"in {first} and {_short(others)} in {path}; make a set of each, "
                    "or write files that agree"
                )
        return names
    return _names_beside(paths[0], fields=fields)


def _short(names: Sequence[str] | None) -> str:
    return "none" if names is None else f"{len(names)}, {', '.join(names[:3])}, ..."


def _names_beside(path: str, *, fields: Fields) -> list[str] | None:
    """Read the classes of a shard set, whose files have no names in them."""
    name = child(str(path)[: -len(base_name(path))].rstrip("/") or ".", CLASSES_FILE)
    if fields != _DEFAULT or "?" in path:
        return None
    if StoragePath(name).kind() != pafs.FileType.File:
        return None
    return parse_classes(read_text(name), name=name)


def _names_in(path: str, *, fields: Fields) -> list[str] | None:
    with open_stored(path) as stored:
        metadata = pq.read_schema(stored).metadata or {}
    try:
        info = json.loads(metadata.get(b"huggingface", b"{}"))
        names = info["info"]["features"][fields.label]["names"]
    except (ValueError, KeyError, TypeError):
        return None
    if not isinstance(names, list):
        return None
    return [plain(str(name)) for name in names]


def unpack(path: str | Path, *, blob: Path, fields: Fields = USUAL_FIELDS) -> None:
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
    fields = columns(fields)
    with _open(str(path), fields=fields) as file, partial.open("wb") as out:
        column = _image_column(file, fields=fields)
        for group in range(file.num_row_groups):
            images = file.read_row_group(group, columns=[column])[fields.image]
            for chunk in images.chunks:
                values = chunk.field("bytes") if column != fields.image else chunk
                for value in values:
                    sizes.append(out.write(value.as_buffer() or b""))
    with partial_index.open("wb") as out:
        np.save(out, np.cumsum(sizes, dtype=np.int64))
    os.replace(partial_index, index)
    os.replace(partial, blob)
