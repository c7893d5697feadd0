"""Make small shard sets for tests, and read them as the workers of a run would."""

from __future__ import annotations

import functools
import io
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pipelines.ingest.footers import ShardSet
from pipelines.ingest.plan import Unit
from pipelines.ingest.reading import share_tables
from pipelines.shards.format import CLASSES_FILE, SCHEMA


@functools.cache
def jpeg(number: int, *, size: tuple[int, int] = (16, 12)) -> bytes:
    """Encode a picture of coarse noise, another for each number; size is (w, h)."""
    rng = np.random.default_rng(number)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    coarse.resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def write_set(
    folder: Path,
    *,
    groups: Sequence[Sequence[int]],
    num_classes: int = 3,
    size: tuple[int, int] = (16, 12),
) -> str:
    """Write a set whose files have row groups of these many rows; give its address."""
    folder.mkdir(parents=True)
    (folder / CLASSES_FILE).write_text(
        json.dumps([f"c{i}" for i in range(num_classes)])
    )
    first = 0
    for number, of_file in enumerate(groups):
        name = f"set-{number:05d}-of-{len(groups):05d}.parquet"
        with pq.ParquetWriter(folder / name, SCHEMA) as writer:
            for num_rows in of_file:
                ids = range(first, first + num_rows)
                columns = {
                    "image": [jpeg(i, size=size) for i in ids],
                    "label": [i % num_classes for i in ids],
                    "key": [f"k{i}" for i in ids],
                    "width": [size[0]] * num_rows,
                    "height": [size[1]] * num_rows,
                }
                writer.write_table(pa.table(columns, schema=SCHEMA))
                first += num_rows
    return str(folder)


def worker_tables(
    units: Iterable[Unit], *, shards: ShardSet, num_workers: int, worker: int
) -> Iterator[pa.Table]:
    """Give one worker its share tables: dealt out in turn, as Ray deals them."""
    tables = itertools.chain.from_iterable(
        share_tables(
            unit,
            address=shards.address,
            num_classes=len(shards.classes),
            num_workers=num_workers,
        )
        for unit in units
    )
    return itertools.islice(tables, worker, None, num_workers)
