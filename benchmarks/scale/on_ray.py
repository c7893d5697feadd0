"""Time the driver's board and the split of blocks on the Ray that RAY_ADDRESS names."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import ray
from ray.actor import ActorHandle
from ray.data import DataIterator

from benchmarks.scale.keeping import message
from pipelines.config import Data
from pipelines.ingest.footers import read_shard_set
from pipelines.ingest.plan import plan_epoch
from pipelines.ingest.reading import Reading
from pipelines.ingest.source import shares, split_units
from pipelines.telling.board import Board
from recipes.imagenet import so_vit_14

_TIMEOUT_S = 300.0
_NUM_BLOCKS = 1000


@dataclass(frozen=True, kw_only=True)
class RayCost:
    """Hold what Ray adds."""

    post_us: float
    """To post a message to the board, an actor, and to take it."""
    num_workers: int
    num_blocks: int
    block_ms: float
    """Of the blocks after the first: the start of a split is left out."""


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Be connected to the Ray that is there, which is left running."""
    if ray.is_initialized():
        yield
        return
    ray.init(log_to_driver=False, logging_level=logging.WARNING)
    try:
        yield
    finally:
        ray.shutdown()


def measure_ray(address: str, *, num_workers: int, num_messages: int) -> RayCost:
    """Time both; `address` is of a set that all machines of the Ray can read."""
    num_blocks, block_ms = measure_blocks(address, num_workers=num_workers)
    return RayCost(
        post_us=measure_board_actor(num_messages),
        num_workers=num_workers,
        num_blocks=num_blocks,
        block_ms=block_ms,
    )


def measure_board_actor(num_messages: int) -> float:
    """Post to a board as rank 0 does and take as the driver does: us a message."""
    board = cast(ActorHandle, ray.remote(num_cpus=0)(Board).remote())
    ray.get(board.take.remote())  # it has started
    start_s = time.perf_counter()
    for step in range(num_messages):
        board.post.remote(message(step))
    num_taken = 0
    while num_taken < num_messages:
        num_taken += len(ray.get(board.take.remote()))
    seconds = time.perf_counter() - start_s
    ray.kill(board)
    return 1e6 * seconds / num_messages


def measure_blocks(address: str, *, num_workers: int) -> tuple[int, float]:
    """Split a set's blocks among threads of this process, one for each worker.

    Returns the number of blocks after the first, and the ms of each. A coordinator
    that is faster than one process can take shows as that process's speed.
    """
    shards = read_shard_set(address)
    num_units = max(_NUM_BLOCKS // num_workers, 1)
    batch_size = -(-shards.groups.total_rows // num_units)
    plan = plan_epoch(shards.groups, batch_size=batch_size, shuffle_rows=batch_size)
    data = dataclasses.replace(so_vit_14().data, train=address, val=address)
    split = split_units(
        list(plan.units()),
        reading=Reading(
            address=address, num_classes=len(shards.classes), num_workers=num_workers
        ),
        data=data,
    )
    times_s = _take_all(split, data=data)
    num_blocks = len(times_s) - 1
    return num_blocks, 1000 * (max(times_s) - min(times_s)) / max(num_blocks, 1)


def _take_all(split: list[DataIterator], *, data: Data) -> list[float]:
    """Take all blocks of all workers; give the time at which each came."""
    times_s: list[float] = []

    def take(iterator: DataIterator) -> None:
        for _ in shares(iterator, data=data):
            times_s.append(time.perf_counter())

    threads = [
        threading.Thread(target=take, args=(iterator,), daemon=True)
        for iterator in split
    ]
    for thread in threads:
        thread.start()
    deadline_s = time.perf_counter() + _TIMEOUT_S
    for thread in threads:
        thread.join(timeout=max(deadline_s - time.perf_counter(), 0))
    if any(thread.is_alive() for thread in threads):
        raise ValueError(
            f"wanted all blocks within {_TIMEOUT_S:.0f} s, came {len(times_s)}; can "
            "all machines of this Ray read the set? set --folder to one they share"
        )
    return times_s
