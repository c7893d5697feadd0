"""Measure what Ray takes to move a block from a reader to a worker."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.config.recipes import load_recipe
from pipelines.data.epoch_plan import plan_epoch
from pipelines.data.reading import Reading
from pipelines.data.shard_set import (
    CLASSES_FILE,
    SCHEMA,
    read_shard_set,
    shard_name,
    write_shard,
)

_CLASSES = tuple(f"class {number}" for number in range(1000))


def write_copies(
    folder: Path, *, num_shards: int, num_rows: int, image_bytes: int
) -> None:
    """Write a shard of random bytes as images, and copies of it."""
    folder.mkdir(parents=True)
    (folder / CLASSES_FILE).write_text(json.dumps(_CLASSES))
    rng = np.random.default_rng(0)
    columns = {
        "image": [rng.bytes(image_bytes) for _ in range(num_rows)],
        "label": [number % len(_CLASSES) for number in range(num_rows)],
        "key": [f"n00000000/{number:08d}.JPEG" for number in range(num_rows)],
        "width": [500] * num_rows,
        "height": [375] * num_rows,
    }
    first, *others = (
        folder / shard_name("set", index=index, num_shards=num_shards)
        for index in range(num_shards)
    )
    # As many rows in a group as photographs have.
    write_shard(first, rows=pa.table(columns, schema=SCHEMA), rows_per_group=37)
    for other in others:
        shutil.copyfile(first, other)


def measure_blocks(folder: Path, *, num_workers: int, num_blocks: int = 1000) -> float:
    """Measure the milliseconds per block, dealt to one thread per worker on Ray.

    The start of the split is left out. If the coordinator is faster than one process
    can read, that process's speed is measured.
    """
    from pipelines.worker.ray_source import shares, split_units

    write_copies(folder, num_shards=32, num_rows=1024, image_bytes=2000)
    shards = read_shard_set(str(folder))
    batch_size = -(-shards.groups.total_rows // max(num_blocks // num_workers, 1))
    plan = plan_epoch(shards.groups, batch_size=batch_size, shuffle_rows=batch_size)
    data = load_recipe("imagenet.so_vit_14").data
    data = dataclasses.replace(data, train=str(folder), val=str(folder))
    reading = Reading(
        address=str(folder), num_classes=len(_CLASSES), num_workers=num_workers
    )
    split = split_units(list(plan.units()), reading=reading, data=data)

    def take(iterator: Any) -> list[float]:
        return [time.perf_counter() for _ in shares(iterator, data=data)]

    with ThreadPoolExecutor(num_workers) as pool:
        times_s = list(itertools.chain.from_iterable(pool.map(take, split)))
    return 1000 * (max(times_s) - min(times_s)) / max(len(times_s) - 1, 1)
