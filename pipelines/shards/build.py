"""Make one shard: read its images wherever they lie, check them and write them."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa

from pipelines.data.shard_set import ROWS_PER_GROUP, SCHEMA, write_shard
from pipelines.shards.hf_parquet import unpack
from pipelines.shards.images import BadImageError, check_image
from pipelines.shards.planning import Done, Plan
from pipelines.shards.state import NUM_THREADS, read_records
from pipelines.shards.stored import child, open_stored
from pipelines.shards.zips import read_member
from pipelines.storage.path import StoragePath
from pipelines.storage.retry import is_remote, retrying


def unpack_container(plan: Plan, container: int) -> Done:
    """Unpack one Parquet file of the source, so that its images can be read alone."""
    blob = plan.blob_path(container)
    blob.parent.mkdir(parents=True, exist_ok=True)
    unpack(plan.containers[container], blob=blob, fields=plan.fields)
    bounds = np.load(blob.with_suffix(".npy"), mmap_mode="r")
    return Done(num_rows=len(bounds) - 1, num_skipped=0)


def build_shard(plan: Plan, shard: int) -> Done:
    """Read, check and write the images of one shard.

    Holds the shard's images in memory, up to three times their size.

    Raises:
        OSError: The source cannot be read now.
        ValueError: A file of the source is gone or changed.
    """
    records = read_records(plan, shard=shard)
    images = _read_images(plan, records=records)
    tables: list[pa.Table] = []
    skipped: list[tuple[int, str]] = []
    for start in range(0, len(records), ROWS_PER_GROUP):
        some = records.slice(start, ROWS_PER_GROUP).to_pylist()
        tables.append(_check_rows(plan, records=some, images=images, skipped=skipped))
        images = images[len(some) :]  # frees them: the table has its own copy
    rows = pa.concat_tables([SCHEMA.empty_table(), *tables])
    write_shard(
        plan.shard(shard),
        rows=rows,
        rows_per_group=plan.recipe.rows_per_group,
        metadata={"digest": plan.digest, "skipped": json.dumps(skipped)},
    )
    return Done(num_rows=len(rows), num_skipped=len(skipped))


def _check_rows(
    plan: Plan,
    *,
    records: list[dict[str, Any]],
    images: list[bytes | BadImageError],
    skipped: list[tuple[int, str]],
) -> pa.Table:
    rows = []
    for record, data in zip(records, images, strict=False):
        try:
            if isinstance(data, BadImageError):
                raise data
            image = check_image(
                data,
                full=plan.recipe.check == "full",
                short_side=plan.recipe.short_side,
                quality=plan.recipe.quality,
            )
        except BadImageError as error:
            skipped.append((record["listed"], str(error)))
            continue
        size = {"width": image.width, "height": image.height}
        labels = {"label": record["label"], "key": record["key"]}
        rows.append({"image": image.data, **labels, **size})
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def _read_images(plan: Plan, *, records: pa.Table) -> list[bytes | BadImageError]:
    containers = records["container"].to_numpy()
    offsets = records["offset"].to_numpy()
    if plan.kind == "folder":
        return _read_files(plan.containers[0], keys=records["key"].to_pylist())
    images: list[bytes | BadImageError] = [b""] * len(records)
    # In the order they lie on the disk, file by file.
    order = np.lexsort((offsets, containers))
    starts = np.flatnonzero(np.diff(containers[order], prepend=-1))
    for rows in np.split(order, starts[1:]):
        _read_from(plan, records=records, rows=rows, images=images)
    return images


def _read_files(root: str, *, keys: Sequence[str]) -> list[bytes | BadImageError]:
    if not is_remote(root):
        return [read_file(StoragePath(os.path.join(root, key))) for key in keys]
    # A request takes tens of milliseconds, most of them waiting.
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        return list(
            pool.map(lambda key: read_file(StoragePath(child(root, key))), keys)
        )


def read_file(place: StoragePath) -> bytes | BadImageError:
    """Read a file whole; the error that makes it a bad image where it may not be.

    Raises ValueError where it is gone.
    """
    try:
        if place.is_remote:
            return place.read()
        return Path(place.address).read_bytes()
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise _changed(str(place), problem="is gone since it was listed") from None
    except PermissionError as error:
        return BadImageError(f"cannot be read: {error.strerror or error}")


def _changed(name: str, *, problem: str) -> ValueError:
    return ValueError(
        f"{name} {problem}: the source changed. Put it back and type the same command "
        "again, or start anew with what is there by --overwrite."
    )


def _read_from(
    plan: Plan,
    *,
    records: pa.Table,
    rows: np.ndarray,
    images: list[bytes | BadImageError],
) -> None:
    container = records["container"][int(rows[0])].as_py()
    offsets = records["offset"].to_numpy()[rows]
    if plan.kind == "parquet":
        path = str(plan.blob_path(container))
        bounds = np.load(plan.blob_path(container).with_suffix(".npy"), mmap_mode="r")
        offsets, sizes = bounds[offsets], bounds[offsets + 1] - bounds[offsets]
    else:
        path = plan.containers[container]
        sizes = records["size_bytes"].to_numpy()[rows]
    try:
        stored = open_stored(path, reads_on=False)
    except FileNotFoundError:
        raise _changed(path, problem="is gone since it was listed") from None
    with stored as file:
        for row, offset, size in zip(rows, offsets, sizes, strict=True):
            read = functools.partial(
                _unzip if plan.kind == "zip" else _read_at,
                file,
                offset=int(offset),
                size_bytes=int(size),
            )
            data = images[row] = retrying(read, address=path)
            if isinstance(data, bytes) and len(data) < size:
                raise _changed(path, problem="is shorter than when it was listed")


def _read_at(file: BinaryIO, *, offset: int, size_bytes: int) -> bytes:
    file.seek(offset)
    return file.read(size_bytes)


def _unzip(file: BinaryIO, *, offset: int, size_bytes: int) -> bytes | BadImageError:
    try:
        return read_member(file, offset=offset, size_bytes=size_bytes)
    except ValueError as error:
        return BadImageError(str(error))
