"""Checkpoints are evaluated beside training, in turn, and by the next driver too."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from pipelines.checkpoints.snapshot import MODEL_FILE, save_checkpoint
from pipelines.checkpoints.store import CheckpointStore
from pipelines.config import Run, Validation
from pipelines.data.batch import Position
from pipelines.data.shard_set import read_shard_set
from pipelines.driver.async_evaluation import Validator
from pipelines.evaluation.held_out import held_out_of
from pipelines.events.channel import (
    CheckpointSaved,
    Event,
    Figure,
    Message,
    Metrics,
    Tick,
)
from pipelines.storage.path import StoragePath
from pipelines.worker.job import Job, outcome
from tests.small_runs import small_run, state_of
from tests.small_sets import write_set
from tests.waiting import wait_for

NUM_STEPS = 10


@pytest.fixture
def run(tmp_path: Path) -> Run:
    address = write_set(tmp_path / "set", groups=[[20]])
    run = small_run(address, num_epochs=6, ema_decay=0.9)
    validation = Validation(asynchronous=True, every_epochs=2, num_cpus=0.5)
    return dataclasses.replace(run, validation=validation)


def keep(run: Run, folder: Path, epoch: int) -> CheckpointSaved:
    """Keep a checkpoint as a worker does that evaluates nothing."""
    state = state_of(run, seed=epoch)
    name = f"epoch_{epoch:04d}"
    (folder / name).mkdir(parents=True)
    save_checkpoint(
        folder / name,
        run=run,
        position=Position(epoch=epoch, step=NUM_STEPS * epoch),
        classes=("c0", "c1", "c2"),
        metrics={"epoch": epoch},
        model=state.model,
        ema=state_of(run, seed=100 + epoch).model,
        optimizer=None,
    )
    return CheckpointSaved(name=name, epoch=epoch, step=NUM_STEPS * epoch)


def job_of(run: Run) -> Job:
    shards = read_shard_set(run.data.val)
    return Job(
        run=run,
        train_shards=shards,
        val_shards=shards,
        held_out=held_out_of(run.validation, val=shards, classes=shards.classes),
        tracking_uri="",
        mlflow_run_id="",
    )


def finish(validator: Validator) -> None:
    def is_idle() -> bool:
        validator.handle(Tick())
        return not validator.is_busy

    wait_for(is_idle, what="the evaluations")


def test_checkpoints_are_measured_in_turn_and_by_the_next_driver(
    ray_local: None, tmp_path: Path, run: Run
) -> None:
    folder = tmp_path / "runs" / "mine"
    job, place = job_of(run), StoragePath(str(folder))
    # The driver before was killed when this one was written.
    left = keep(run, folder, 2)
    heard: list[Event] = []
    validator = Validator(job, folder=place, emit=heard.append)
    for epoch in (3, 4):
        validator.handle(keep(run, folder, epoch))
    damaged = keep(run, folder, 6)
    weights = folder / damaged.name / MODEL_FILE
    weights.write_bytes(weights.read_bytes()[:-8])
    validator.handle(damaged)
    finish(validator)

    measured = {item.step: item.metrics for item in heard if isinstance(item, Metrics)}
    assert measured.keys() == {20, 40}
    for metrics in measured.values():
        assert metrics["val/num_images"] == 20
        assert metrics["val/top1"] != metrics["val_raw/top1"] or (
            metrics["val/loss"] != metrics["val_raw/loss"]
        )
    assert sum(isinstance(item, Figure) for item in heard) == 2
    lines = [item.line for item in heard if isinstance(item, Message)]
    assert lines[0].startswith(f"{left.name}  held-out top-1 ")
    assert any("epoch_0006 is not evaluated" in line for line in lines)

    kept = {kept.name: kept for kept in CheckpointStore(place, num_to_keep=1).kept()}
    assert kept["epoch_0002"].metrics["val/top1"] == measured[20]["val/top1"]
    # One that is not due is kept no longer for that.
    assert kept["epoch_0003"].is_measured
    assert "val/top1" not in kept["epoch_0003"].metrics
    best = max(measured, key=lambda step: measured[step]["val/top1"])
    found = outcome(run, folder=place)
    assert Path(str(found.best)).name == f"epoch_{best // NUM_STEPS:04d}"
    # Nothing is left for another driver.
    assert not Validator(job, folder=place, emit=heard.append).is_busy


def test_what_training_is_too_far_ahead_of_is_left_out(
    ray_local: None, tmp_path: Path, run: Run
) -> None:
    folder = tmp_path / "runs" / "mine"
    place = StoragePath(str(folder))
    heard: list[Event] = []
    every = dataclasses.replace(run.validation, every_epochs=1)
    run = dataclasses.replace(run, validation=every)
    validator = Validator(job_of(run), folder=place, emit=heard.append)
    for epoch in range(1, 5):
        validator.handle(keep(run, folder, epoch))
    validator.handle(Tick())
    validator.cancel()
    lines = [item.line for item in heard if isinstance(item, Message)]
    assert lines == ["epoch_0002 is not evaluated: training is ahead"]
    # So that it does not stay for ever; the others are for the next driver.
    store = CheckpointStore(place, num_to_keep=1, waits=True)
    store.retire(until=NUM_STEPS * 4)
    names = [kept.name for kept in store.kept()]
    assert names == ["epoch_0001", "epoch_0003", "epoch_0004"]


def test_there_must_be_room_beside_the_workers(
    ray_local: None, tmp_path: Path, run: Run
) -> None:
    validation = dataclasses.replace(run.validation, num_gpus=1)
    wanting = dataclasses.replace(run, validation=validation)
    with pytest.raises(ValueError, match=r"expected 1 GPU beside .* got 0;"):
        Validator(
            job_of(wanting), folder=StoragePath(str(tmp_path)), emit=lambda item: None
        )
