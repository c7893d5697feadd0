"""Makes one shard: reads its images wherever they lie, checks them and writes them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipelines.hf_parquet import unpack
from pipelines.images import BadImageError, check_image
from pipelines.shard_format import SCHEMA, write_shard
from pipelines.shard_plan import Done, Plan, read_records


def unpack_container(plan: Plan, container: int) -> Done:
    """Unpack one Parquet file of the source, so that its images can be read alone."""
    blob = plan.blob_path(container)
    blob.parent.mkdir(exist_ok=True)
    unpack(Path(plan.containers[container]), blob=blob)
    bounds = np.load(blob.with_suffix(".npy"), mmap_mode="r")
    return Done(num_rows=len(bounds) - 1, num_skipped=0)


def build_shard(plan: Plan, shard: int) -> Done:
    """Read, check and write the images of one shard.

    Holds the shard's images in memory about twice.

    Raises:
        OSError: A file of the source is gone or cannot be read.
    """
    records = read_records(plan, shard=shard)
    images = _read_images(plan, records=records)
    columns: dict[str, list[object]] = {name: [] for name in SCHEMA.names}
    skipped: list[tuple[int, str]] = []
    keys, labels = records["key"].to_pylist(), records["label"].to_pylist()
    listed = records["listed"].to_pylist()
    for row, key in enumerate(keys):
        data, images[row] = images[row], b""  # frees it where it is shrunk
        try:
            checked = check_image(
                data,
                full=plan.recipe.check == "full",
                short_side=plan.recipe.short_side,
                quality=plan.recipe.quality,
            )
        except BadImageError as error:
            skipped.append((listed[row], str(error)))
            continue
        values = (checked.data, labels[row], key, checked.width, checked.height)
        for name, value in zip(SCHEMA.names, values, strict=True):
            columns[name].append(value)
    write_shard(
        plan.shard_path(shard),
        rows=pa.table(columns, schema=SCHEMA),
        rows_per_group=plan.recipe.rows_per_group,
        metadata={"digest": plan.digest, "skipped": json.dumps(skipped)},
    )
    return Done(num_rows=len(columns["key"]), num_skipped=len(skipped))


def _read_images(plan: Plan, *, records: pa.Table) -> list[bytes]:
    containers = records["container"].to_numpy()
    offsets = records["offset"].to_numpy()
    if plan.kind == "folder":
        root = Path(plan.containers[0])
        return [(root / key).read_bytes() for key in records["key"].to_pylist()]
    images = [b""] * len(records)
    # In the order they lie on the disk, file by file.
    order = np.lexsort((offsets, containers))
    starts = np.flatnonzero(np.diff(containers[order], prepend=-1))
    for rows in np.split(order, starts[1:]):
        _read_from(plan, records=records, rows=rows, images=images)
    return images


def _read_from(
    plan: Plan, *, records: pa.Table, rows: np.ndarray, images: list[bytes]
) -> None:
    container = records["container"][int(rows[0])].as_py()
    offsets = records["offset"].to_numpy()[rows]
    if plan.kind == "parquet":
        path = plan.blob_path(container)
        bounds = np.load(path.with_suffix(".npy"), mmap_mode="r")
        offsets, sizes = bounds[offsets], bounds[offsets + 1] - bounds[offsets]
    else:
        path = Path(plan.containers[container])
        sizes = records["size_bytes"].to_numpy()[rows]
    with path.open("rb") as file:
        for row, offset, size in zip(rows, offsets, sizes, strict=True):
            file.seek(int(offset))
            images[row] = file.read(int(size))
            if len(images[row]) < size:
                raise OSError(f"{path} is shorter than when it was listed.")
