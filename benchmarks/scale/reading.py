"""Time footers, and the reading and cutting of units, on a disk and in a bucket."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from pipelines.files import Place
from pipelines.ingest.footers import read_shard_set
from pipelines.ingest.plan import Unit, plan_epoch
from pipelines.ingest.reading import Reading, read_rows, share_tables
from pipelines.shards.format import CLASSES_FILE, SCHEMA, shard_name, write_shard

if TYPE_CHECKING:
    from tests.s3_server import Line

_NUM_CLASSES = 1000
FOOTER_IMAGE_BYTES = 20
_CUT_IMAGE_BYTES = 2000
_NUM_UPLOADS = 8  # at a time


@dataclass(frozen=True, kw_only=True)
class FooterCost:
    """Hold what the footers of some shards took, for each shard."""

    num_shards: int
    groups_per_shard: int
    ms: float
    num_requests: int = 0
    latency_ms: float = 0.0


@dataclass(frozen=True, kw_only=True)
class ReadCost:
    """Hold what a unit took to be read and cut."""

    num_workers: int
    num_rows: int
    num_slices: int
    num_files: int
    num_blocks: int
    mb: float
    seconds: float
    num_requests: int = 0
    latency_ms: float = 0.0


def write_copies(
    folder: Path,
    *,
    num_shards: int,
    num_rows: int,
    image_bytes: int,
    rows_per_group: int = 64,
) -> str:
    """Write a shard of random bytes for images, and copies of it; give the address."""
    folder.mkdir(parents=True)
    classes = [f"class {number}" for number in range(_NUM_CLASSES)]
    (folder / CLASSES_FILE).write_text(json.dumps(classes))
    content = np.random.default_rng(0).bytes(num_rows * image_bytes)
    bounds = range(0, len(content), image_bytes)
    columns = {
        "image": [content[start : start + image_bytes] for start in bounds],
        "label": [number % _NUM_CLASSES for number in range(num_rows)],
        "key": [f"n00000000/{number:08d}.JPEG" for number in range(num_rows)],
        "width": [500] * num_rows,
        "height": [375] * num_rows,
    }
    names = [
        shard_name("set", index=index, num_shards=num_shards)
        for index in range(num_shards)
    ]
    rows = pa.table(columns, schema=SCHEMA)
    write_shard(folder / names[0], rows=rows, rows_per_group=rows_per_group)
    for name in names[1:]:
        shutil.copyfile(folder / names[0], folder / name)
    return str(folder)


def measure_footers(address: str, *, line: Line | None = None) -> FooterCost:
    """Read a set's footers; in a bucket, count the requests."""
    if line is not None:
        line.taken()
    start_s = time.perf_counter()
    groups = read_shard_set(address).groups
    seconds = time.perf_counter() - start_s
    num_shards = len(groups.paths)
    return FooterCost(
        num_shards=num_shards,
        groups_per_shard=int(groups.num_groups[0]),
        ms=1000 * seconds / num_shards,
        num_requests=0 if line is None else len(line.taken()),
        latency_ms=0.0 if line is None else 1000 * line.latency_s,
    )


def measure_reading(address: str, *, num_rounds: int, num_rows: int) -> ReadCost:
    """Read and cut units, as a read task does; give the one that took least.

    They come from the page cache, so this is the most that a reader can do.
    """
    found = [
        _read_unit(address, num_rows=num_rows, epoch=epoch)
        for epoch in range(num_rounds + 1)
    ]
    # The first takes fresh memory from the system.
    return min(found[1:], key=lambda cost: cost.seconds)


def _read_unit(address: str, *, num_rows: int, epoch: int) -> ReadCost:
    shards = read_shard_set(address)
    plan = plan_epoch(
        shards.groups, batch_size=num_rows, shuffle_rows=num_rows, epoch=epoch
    )
    reading = Reading(address=address, num_classes=len(shards.classes), num_workers=8)
    return _time_unit(plan.unit(0), reading=reading)


def _time_unit(unit: Unit, *, reading: Reading) -> ReadCost:
    num_blocks = num_bytes = 0
    start_s = time.perf_counter()
    for table in share_tables(unit, reading=reading):
        num_blocks += 1
        num_bytes += table.nbytes
    seconds = time.perf_counter() - start_s
    return ReadCost(
        num_workers=reading.num_workers,
        num_rows=unit.num_rows,
        num_slices=len(unit.slices),
        num_files=len({item.path for item in unit.slices}),
        num_blocks=num_blocks,
        mb=num_bytes / 1e6,
        seconds=seconds,
    )


def measure_cutting(
    folder: Path, *, num_gpus: Sequence[int], images_per_gpu: int
) -> tuple[ReadCost, ...]:
    """Cut units of one batch or more for some numbers of workers.

    Images are small, so that a batch of many workers fits into a laptop: what shows is
    the cost of a row and of a block, not of bytes.
    """
    num_rows = max(num_gpus) * images_per_gpu
    address = write_copies(
        folder,
        num_shards=max(num_rows // 1024, 1),
        num_rows=min(num_rows, 1024),
        image_bytes=_CUT_IMAGE_BYTES,
    )
    shards = read_shard_set(address)
    costs = []
    for num_workers in num_gpus:
        batch_size = num_workers * images_per_gpu
        plan = plan_epoch(
            shards.groups,
            batch_size=batch_size,
            shuffle_rows=min(2048, num_rows),
        )
        reading = Reading(
            address=address, num_classes=_NUM_CLASSES, num_workers=num_workers
        )
        _time_unit(plan.unit(0), reading=reading)
        costs.append(_time_unit(plan.unit(0), reading=reading))
    return tuple(costs)


@contextlib.contextmanager
def bucket(*, latency_ms: float) -> Iterator[Line]:
    """Serve S3 on loopback, with a delay before each answer.

    Raises ValueError where the server is not installed.
    """
    if importlib.util.find_spec("moto") is None:
        raise ValueError(
            "wanted moto, which serves S3 on loopback, came a machine without it; "
            "install the extra 'dev', or give --costs"
        )
    from tests.s3_server import s3_server

    with s3_server() as line:
        line.latency_s = latency_ms / 1000
        yield line


def upload(folder: Path, *, line: Line) -> str:
    """Copy a set into the bucket, without the delay; give its address."""
    latency_s, line.latency_s = line.latency_s, 0.0
    address = f"s3://bucket/{folder.name}"

    def put(file: Path) -> None:
        Place(address).within(file.name).write(file.read_bytes())

    with ThreadPoolExecutor(_NUM_UPLOADS) as pool:
        list(pool.map(put, folder.iterdir()))
    line.latency_s = latency_s
    return address


def measure_bucket_reading(address: str, *, line: Line, num_rows: int) -> ReadCost:
    """Read a unit's rows from the bucket, and count the requests."""
    shards = read_shard_set(address)
    plan = plan_epoch(shards.groups, batch_size=num_rows, shuffle_rows=num_rows)
    unit = plan.unit(0)
    reading = Reading(address=address, num_classes=len(shards.classes))
    line.taken()
    start_s = time.perf_counter()
    rows = read_rows(unit, reading=reading)
    seconds = time.perf_counter() - start_s
    return ReadCost(
        num_workers=1,
        num_rows=unit.num_rows,
        num_slices=len(unit.slices),
        num_files=len({item.path for item in unit.slices}),
        num_blocks=0,
        mb=rows.nbytes / 1e6,
        seconds=seconds,
        num_requests=len(line.taken()),
        latency_ms=1000 * line.latency_s,
    )
