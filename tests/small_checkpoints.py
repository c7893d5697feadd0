"""Write tiny checkpoints, also in processes that are killed meanwhile."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import torch

from pipelines.checkpoints.snapshot import Snapshot
from pipelines.checkpoints.store import CheckpointStore
from pipelines.data.batch import Position
from pipelines.storage.path import StoragePath
from tests.small_runs import small_run

RUN = small_run("none")


def snapshot_of(step: int, *, top1: float | None = None) -> Snapshot:
    """Build a step's snapshot, whose only weight is the step's number."""
    weights = {"weight": torch.full((3,), float(step))}
    return Snapshot(
        run=RUN,
        position=Position(epoch=step, step=step),
        classes=("a", "b"),
        metrics={} if top1 is None else {"val/top1": top1},
        model=weights,
        ema=weights,
        optimizer={"state": weights},
    )


def write_and_be_killed(folder: Path, *, name: str, flush: int) -> None:
    """Write a checkpoint, and kill this process at one of its flushes to the disk."""
    before = iter(range(1, flush))

    def flushed(descriptor: int) -> None:
        if next(before, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)

    os.fsync = flushed
    here = CheckpointStore(StoragePath(str(folder)), num_to_keep=2)
    here.write(snapshot_of(2), name=name)
