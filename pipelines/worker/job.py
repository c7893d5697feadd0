"""What the driver passes to every worker, and the outcome of a training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from pipelines.checkpoints.store import CheckpointStore
from pipelines.config import Run
from pipelines.config.own_code import OwnCode
from pipelines.data.shard_set import ShardSet
from pipelines.evaluation.held_out import HeldOut
from pipelines.storage.path import StoragePath


@dataclass(frozen=True, kw_only=True)
class Job:
    """Everything the driver passes to every worker."""

    run: Run
    train_shards: ShardSet
    val_shards: ShardSet | None
    held_out: tuple[HeldOut, ...]
    """What the run is evaluated on: its own held-out set, and any further ones."""
    tracking_uri: str
    mlflow_run_id: str
    class_counts: tuple[int, ...] = ()
    """Training images of each class, where the loss weighs classes."""
    keeps_model: bool = True
    """Whether to log the model, and pictures of its errors, to MLflow."""
    code: OwnCode | None = None
    """The user's own recipe file, which may register the model."""


@dataclass(frozen=True, kw_only=True)
class Trained:
    """Outcome of a training."""

    metrics: Mapping[str, float]
    """Metrics of its last checkpoint."""
    checkpoint: StoragePath | None
    """Its last checkpoint; None where it ended before the first."""
    best: StoragePath | None = None
    """Its best checkpoint, where one was evaluated."""
    best_metrics: Mapping[str, float] = field(default_factory=dict)
    """Metrics of its best checkpoint."""


def outcome(run: Run, *, folder: StoragePath) -> Trained:
    """Read the outcome of a training from its run's folder."""
    store = CheckpointStore(
        folder,
        num_to_keep=run.num_checkpoints_to_keep,
        metric=run.validation.metric,
    )
    there, best = store.kept(), store.best()
    if not there:
        return Trained(metrics={}, checkpoint=None)
    return Trained(
        metrics=there[-1].metrics,
        checkpoint=store.place(there[-1].name),
        best=store.place(best.name) if best is not None else None,
        best_metrics=best.metrics if best is not None else {},
    )
