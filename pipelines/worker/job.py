"""Define what the driver gives every worker, and what it gets at the end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pipelines.checkpoints.store import CheckpointStore
from pipelines.config import Run
from pipelines.config.own_code import OwnCode
from pipelines.data.shard_set import ShardSet
from pipelines.evaluation.held_out import HeldOut
from pipelines.storage.path import StoragePath


@dataclass(frozen=True, kw_only=True)
class Job:
    """Hold what the driver gives every worker."""

    run: Run
    train_shards: ShardSet
    val_shards: ShardSet | None
    held_out: tuple[HeldOut, ...]
    """What the run is evaluated on: its own held-out set, and any further ones."""
    tracking_uri: str
    mlflow_run_id: str
    keeps_model: bool = True
    """Whether its model, and pictures of what it gets wrong, go to MLflow."""
    code: OwnCode | None = None
    """The user's own recipe file, which may register the model."""


@dataclass(frozen=True, kw_only=True)
class Trained:
    """Say what a training came to."""

    metrics: Mapping[str, float]
    """What its last epoch reported."""
    checkpoint: StoragePath | None
    """Its last checkpoint; None where it ended before the first."""
    best: StoragePath | None = None
    """Its best checkpoint, where one was evaluated."""


def outcome(run: Run, *, folder: StoragePath) -> Trained:
    """Read from a run's folder what it has come to."""
    store = CheckpointStore(folder, num_to_keep=run.num_checkpoints_to_keep)
    there, best = store.kept(), store.best()
    if not there:
        return Trained(metrics={}, checkpoint=None)
    return Trained(
        metrics=there[-1].metrics,
        checkpoint=store.place(there[-1].name),
        best=store.place(best.name) if best is not None else None,
    )
