"""Makes one shard: reads its images wherever they lie, checks them and writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.shards.format import ROWS_PER_GROUP, SCHEMA, write_shard
from pipelines.shards.hf_parquet import unpack
from pipelines.shards.images import BadImageError, check_image
from pipelines.shards.planning import Done, Plan
from pipelines.shards.state import read_records


def unpack_container(plan: Plan, container: int) -> Done:
    """Unpack one Parquet file of the source, so that its images can be read alone."""
    blob = plan.blob_path(container)
    blob.parent.mkdir(parents=True, exist_ok=True)
    unpack(Path(plan.containers[container]), blob=blob)
    bounds = np.load(blob.with_suffix(".npy"), mmap_mode="r")
    return Done(num_rows=len(bounds) - 1, num_skipped=0)


def build_shard(plan: Plan, shard: int) -> Done:
    """Read, check and write the images of one shard.

    Holds the shard's images in memory, up to three times their size.

    Raises:
        OSError: A file of the source is gone or cannot be read.
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
    images: list[bytes],
    skipped: list[tuple[int, str]],
) -> pa.Table:
    rows = []
    for record, data in zip(records, images, strict=False):
        try:
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
