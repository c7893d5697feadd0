"""Write small shard sets for tests, and read them as a run's workers do."""

from __future__ import annotations

import functools
import io
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pipelines.config import PixelSettings
from pipelines.data.epoch_plan import Unit
from pipelines.data.reading import Reading, share_tables
from pipelines.data.shard_set import CLASSES_FILE, SCHEMA, ShardSet


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
    """Write a set whose files have row groups of these sizes; return its address."""
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


def uneven_labels(num_rows: int) -> np.ndarray:
    """Label rows of four of five classes: two thirds the first, one in 27 the last."""
    labels = np.random.default_rng(num_rows).geometric(2 / 3, num_rows)
    return np.minimum(labels, 4) - 1


def reading_of(
    shards: ShardSet, *, num_workers: int = 1, decode: PixelSettings | None = None
) -> Reading:
    """Build the settings by which a set's units are read."""
    return Reading(
        address=shards.address,
        num_classes=len(shards.classes),
        num_workers=num_workers,
        decode=decode,
    )


def worker_tables(
    units: Iterable[Unit],
    *,
    shards: ShardSet,
    num_workers: int,
    worker: int,
    decode: PixelSettings | None = None,
) -> Iterator[pa.Table]:
    """Yield one worker's share tables, dealt out in turn as by Ray."""
    reading = reading_of(shards, num_workers=num_workers, decode=decode)
    tables = itertools.chain.from_iterable(
        share_tables(unit, reading=reading) for unit in units
    )
    return itertools.islice(tables, worker, None, num_workers)


class WorkerOpener:
    """Opener of units for one of several workers, each of which reads all itself."""

    def __init__(
        self,
        shards: ShardSet,
        *,
        num_workers: int = 1,
        worker: int = 0,
        decode: PixelSettings | None = None,
    ) -> None:
        self.opened: list[list[Unit]] = []
        self._units: list[Unit] = []
        self._tables = functools.partial(
            worker_tables,
            shards=shards,
            num_workers=num_workers,
            worker=worker,
            decode=decode,
        )

    def prepare(self, plan: Callable[[], list[Unit]]) -> None:
        """Keep the units until they are opened."""
        self._units = plan()

    def open(self) -> Iterator[pa.Table]:
        """Iterate over this worker's tables."""
        self.opened.append(self._units)
        return self._tables(self._units)
