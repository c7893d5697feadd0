"""Define what the driver gives every worker."""

from __future__ import annotations

from dataclasses import dataclass

from ray.actor import ActorHandle

from pipelines.config import Run
from pipelines.ingest.footers import ShardSet


@dataclass(frozen=True, kw_only=True)
class Job:
    """Hold what the driver gives every worker."""

    run: Run
    train_shards: ShardSet
    val_shards: ShardSet
    board: ActorHandle
    tracking_uri: str
    mlflow_run_id: str
