"""Define what the driver gives every worker, and what it gets at the end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pipelines.config import Run
from pipelines.files import Place
from pipelines.ingest.footers import ShardSet


@dataclass(frozen=True, kw_only=True)
class Job:
    """Hold what the driver gives every worker."""

    run: Run
    train_shards: ShardSet
    val_shards: ShardSet
    tracking_uri: str
    mlflow_run_id: str


@dataclass(frozen=True, kw_only=True)
class Trained:
    """Say what a training came to."""

    metrics: Mapping[str, float]
    """What its last epoch reported."""
    checkpoint: Place | None
    """Its last checkpoint; None where it ended before the first."""
