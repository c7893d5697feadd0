"""Evaluate models of one layer on a small set, in this process or as a worker."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from pipelines.config import Run, Validation
from pipelines.data.shard_set import ShardSet, read_shard_set
from pipelines.evaluation.held_out import HeldOut
from pipelines.evaluation.measure import EvaluationResult, validate
from tests.small_runs import CPU, meeting, small_run, supply_of
from tests.small_sets import jpeg, write_set

NUM_ROWS, NUM_CLASSES, BAD_ROW, NUM_WORST = 37, 5, 20, 6
GOOD = [row for row in range(NUM_ROWS) if row != BAD_ROW]
LABELS = np.arange(NUM_ROWS) % NUM_CLASSES
SIZE = 16
# Row by row: the next class alone, its own beside it, or none.
REAL = np.array(
    [
        [(label + 1) % 5, -1]
        if row % 3 == 0
        else [label, 4]
        if row % 3 == 1
        else [-1] * 2
        for row, label in enumerate(LABELS)
    ],
    dtype=np.int32,
)


def write_damaged_set(folder: Path) -> ShardSet:
    """Write a set that doesn't divide into batches, with one truncated image."""

    def image(number: int, *, size: tuple[int, int]) -> bytes:
        whole = jpeg(number, size=size)
        return whole[:-40] if number == BAD_ROW else whole

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("tests.small_sets.jpeg", image)
        groups = [[5, 9], [7], [1, 11, 4]]
        address = write_set(folder, groups=groups, num_classes=NUM_CLASSES)
    return read_shard_set(address)


def run_of(address: str, **data: Any) -> Run:
    """Build a run that is evaluated on a set."""
    run = small_run(address)
    return dataclasses.replace(
        run,
        data=dataclasses.replace(run.data, **data),
        validation=Validation(num_worst=NUM_WORST),
    )


def linear(seed: int) -> nn.Module:
    """Build a model of one layer."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE * SIZE, NUM_CLASSES))


def held_out(shards: ShardSet, **settings: Any) -> HeldOut:
    """Build the held-out set of shards, with ReaL labels."""
    given: dict[str, Any] = {
        "name": "",
        "shards": shards,
        "classes": shards.classes,
        "columns": None,
        "real": REAL,
    }
    return HeldOut(**(given | settings))


def measured(
    models: dict[str, nn.Module],
    shards: ShardSet,
    *,
    run: Run | None = None,
    described: HeldOut | None = None,
    num_workers: int = 1,
    worker: int = 0,
) -> EvaluationResult:
    """Evaluate in this process, or as one worker of a group."""
    run = run or run_of(shards.address)
    supply = supply_of(
        run, shards=shards, train=False, num_workers=num_workers, worker=worker
    )
    try:
        return validate(
            models,
            supply,
            run=run,
            device=CPU,
            held_out=described,
        )
    finally:
        supply.close()


def logits_by_row(model: nn.Module, shards: ShardSet) -> np.ndarray:
    """Compute the logits (rows, classes) independently: NaN for bad images."""
    run = run_of(shards.address)
    found = np.full((NUM_ROWS, NUM_CLASSES), np.nan)
    supply = supply_of(run, shards=shards, train=False)
    for batch in supply:
        real = batch.weights == 1
        with torch.no_grad():
            found[batch.draw_ids[real.numpy()]] = model(batch.images)[real].numpy()
        if batch.ends_epoch:
            break
    supply.close()
    return found


def measure_as_worker(rank: int, address: str, folder: str, num_workers: int) -> None:
    """Evaluate as one rank of a process group; each saves its outcome."""
    shards = read_shard_set(address)
    with meeting(folder, rank=rank, num_workers=num_workers):
        outcome = measured(
            {"average": linear(1), "raw": linear(2)},
            shards,
            described=held_out(shards),
            num_workers=num_workers,
            worker=rank,
        )
        torch.save(outcome, Path(folder) / f"rank{rank}.pt")
