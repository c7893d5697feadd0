"""Measure the model's constants, with training's own code."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch

from pipelines.checkpoints.snapshot import Snapshot, take_snapshot, write_snapshot
from pipelines.config.recipes import load_recipe
from pipelines.data.epoch_plan import plan_epoch
from pipelines.data.reading import Reading, read_rows, share_tables
from pipelines.data.shard_set import (
    CLASSES_FILE,
    SCHEMA,
    read_shard_set,
    shard_name,
    write_shard,
)
from pipelines.storage.path import StoragePath
from pipelines.training.state import build_state

if TYPE_CHECKING:
    from tests.s3_server import Line

_ROUNDS = 5
_COPIES = 40
_CLASSES = tuple(f"class {number}" for number in range(1000))


def least_s(function: Callable[[], object], *, num_rounds: int = _ROUNDS) -> float:
    """Measure the seconds of the fastest of some calls."""
    times_s = []
    for _ in range(num_rounds):
        start_s = time.perf_counter()
        function()
        times_s.append(time.perf_counter() - start_s)
    return min(times_s)


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


def measure_bucket(folder: Path, *, latency_ms: float, tiny: bool) -> dict[str, Any]:
    """Measure S3 on loopback: footers and a unit with latency, bytes without it."""
    from tests.s3_server import s3_server

    num_shards, num_rows = (8, 64) if tiny else (480, 1024)
    small, large = (folder / name for name in ("small", "photographs"))
    write_copies(small, num_shards=num_shards, num_rows=1216, image_bytes=20)
    write_copies(large, num_shards=16, num_rows=num_rows // 16, image_bytes=110_000)
    with s3_server() as line:
        of_small, of_large = _upload(small), _upload(large)
        line.latency_s = latency_ms / 1000
        footers_s = least_s(lambda: read_shard_set(of_small), num_rounds=1)
        unit = _measure_unit(of_large, line=line, num_rows=num_rows // 2, num_rounds=1)
        line.latency_s = 0.0
        stream = _measure_unit(of_large, line=line, num_rows=num_rows)
    page_cache = _measure_unit(str(large), line=None, num_rows=num_rows)
    return {
        "bucket_latency_ms": latency_ms,
        "bucket_footer_ms": 1000 * footers_s / num_shards,
        "bucket_mb_s": stream["mb_s"],
        "read_mb_s": page_cache["mb_s"],
        "bucket_unit": unit,
    }


def _upload(folder: Path) -> str:
    address = f"s3://bucket/{folder.name}"
    for file in folder.iterdir():
        StoragePath(address).within(file.name).write(file.read_bytes())
    return address


def _measure_unit(
    address: str, *, line: Line | None, num_rows: int, num_rounds: int = _ROUNDS
) -> dict[str, float]:
    """Read a unit from a bucket, or read and cut it from a disk."""
    shards = read_shard_set(address)
    plan = plan_epoch(shards.groups, batch_size=num_rows, shuffle_rows=num_rows)
    unit = plan.unit(0)
    reading = Reading(address=address, num_classes=len(_CLASSES), num_workers=8)

    def read() -> list[pa.Table]:
        if line is None:
            return list(share_tables(unit, reading=reading))
        return [read_rows(unit, reading=reading)]

    tables = read()  # takes fresh memory from the system
    taken = list if line is None else line.taken
    taken()
    seconds, asked = least_s(read, num_rounds=num_rounds), taken()
    return {
        "num_slices": len(unit.slices),
        "num_files": len({part.path for part in unit.slices}),
        "num_requests": len(asked) // num_rounds,
        "seconds": seconds,
        "mb_s": sum(table.nbytes for table in tables) / seconds / 1e6,
    }


def measure_checkpoint(recipe: str, *, folder: Path) -> dict[str, Any]:
    """Copy and write a recipe's state, on one thread: the least times."""
    torch.set_num_threads(1)
    run = load_recipe(recipe)
    state = build_state(run, num_classes=len(_CLASSES), device=torch.device("cpu"))
    for parameter in state.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    state.optimizer.step()  # its moments are there from the first step on

    def copy() -> Snapshot:
        return take_snapshot(
            run=run,
            position=state.position,
            classes=_CLASSES,
            metrics={},
            model=state.model,
            ema=None if state.ema is None else state.ema.module,
            optimizer=state.optimizer,
        )

    snapshot, place = copy(), folder / recipe
    place.mkdir()
    return {
        "copy_s": least_s(copy, num_rounds=_COPIES),
        "write_s": least_s(lambda: write_snapshot(place, snapshot)),
        "num_mb": sum(file.stat().st_size for file in place.iterdir()) / 1e6,
    }


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
