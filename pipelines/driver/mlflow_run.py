"""MLflow records of a training that the driver writes."""

from __future__ import annotations

import dataclasses
import logging
import math
import threading
from collections.abc import Mapping

from pipelines import tracking
from pipelines.checkpoints.manifest import opened
from pipelines.checkpoints.run_record import Record, write_record
from pipelines.config.serialization import flat_params
from pipelines.data.epoch_plan import plan_epoch
from pipelines.data.loader import reading_of
from pipelines.data.reading import read_rows
from pipelines.data.shard_set import ShardSet
from pipelines.events.channel import Event, Figure, Metrics
from pipelines.storage.path import StoragePath
from pipelines.tracking import LateRun, provenance_tags, register_model
from pipelines.tracking.sweeps import NUM_PARAMS, log_metrics
from pipelines.transforms.pillow_decode import is_whole
from pipelines.worker.job import Job, Trained

logger = logging.getLogger(__name__)
_FIRST_METRIC = "val/top1"
_UNSENT = "unsent.json"
_FLUSH_S = 15.0
# For an MLflow that has been away since the run began, when that has ended well.
_OPEN_PATIENCE_S = 120.0


class MlflowSink:
    """Log metrics and figures to a training's MLflow run, on threads of their own.

    A context: at a good end it waits for an MLflow that has been away all along, and at
    any end it flushes.

    Args:
        folder: The run's, for what MLflow has not taken at the end.
        should_stop: Once it is set, nothing is waited for.
    """

    def __init__(
        self,
        tracked: LateRun,
        *,
        uri: str,
        folder: StoragePath,
        should_stop: threading.Event,
    ) -> None:
        self._tracked, self._should_stop = tracked, should_stop
        self._writer = tracking.MetricWriter(
            uri, tracked.needed_id, unsent=folder.within(_UNSENT)
        )
        self._figures = tracking.FigureWriter(uri, tracked.awaited_id)

    def handle(self, event: Event) -> None:
        """Queue metrics and figures; never waits."""
        if isinstance(event, Metrics):
            self._writer.log(event.metrics, step=event.step)
        elif isinstance(event, Figure):
            self._figures.log(event.draw, path=event.path)

    def __enter__(self) -> MlflowSink:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._tracked.wait(_OPEN_PATIENCE_S, until=self._should_stop)
        finally:
            self._figures.close(_FLUSH_S)
            self._writer.close(_FLUSH_S)


def open_tracking(
    record: Record,
    *,
    uri: str,
    num_params: int,
    tags: Mapping[str, str],
    is_begun: bool,
    is_demanded: bool,
) -> LateRun:
    """Open the MLflow run of a record, new or not, now or once MLflow is reachable.

    Raises ValueError, if `is_demanded`, for errors that a retry won't fix.
    """

    def note(run_id: str) -> None:
        write_record(dataclasses.replace(record, mlflow_run_id=run_id))

    tracked = LateRun(
        uri,
        params=flat_params(record.run) | {NUM_PARAMS: num_params},
        tags=provenance_tags() | dict(tags),
        run={
            "experiment": record.run.experiment,
            "name": record.name,
            "run_id": record.mlflow_run_id,
            "place": str(StoragePath(record.run.storage).within(record.name)),
            "is_begun": is_begun,
            "id": record.id,
        },
        on_open=note,
    )
    tracked.open(is_demanded=is_demanded)
    if not record.mlflow_run_id:
        # MLflow's compare page shows the first metric that all runs have had. No value
        # yet, but one that failed early must not take the accuracy off the page.
        first = {_FIRST_METRIC: math.nan}
        tracked.do(lambda run_id: log_metrics(uri, run_id, metrics=first))
    return tracked


def log_shards(shards: ShardSet, *, uri: str, run_id: str, context: str) -> None:
    """Record a shard set as an input of the run."""
    tracking.log_dataset(
        uri,
        run_id,
        name=StoragePath(shards.address).name,
        source=shards.address,
        num_rows=shards.groups.total_rows,
        num_shards=len(shards.groups.paths),
        digest=shards.digest,
        context=context,
    )


def log_model(trained: Trained, *, job: Job) -> None:
    """Log the best model to MLflow, with a held-out image, if any, as its example.

    The last one where none was evaluated.

    It becomes a version of the model that is registered under the recipe's name.
    """
    checkpoint = trained.best or trained.checkpoint
    if checkpoint is None or not job.mlflow_run_id:
        return
    logger.info("keeping the model in MLflow")
    shards = job.val_shards or job.train_shards
    plan = plan_epoch(shards.groups, batch_size=1, shuffle_rows=64, shuffle=False)
    rows = read_rows(plan.unit(0), reading=reading_of(shards, run=job.run))
    images = (image.as_py() or b"" for image in rows["image"])
    example = next(filter(is_whole, images), b"")
    uri, run_id = job.tracking_uri, job.mlflow_run_id
    with opened(checkpoint) as folder:
        address = tracking.log_model(
            uri, run_id, checkpoint=folder, example=example, code=job.code
        )
    register_model(
        uri,
        address,
        name=job.run.recipe,
        run_id=run_id,
        top1=(trained.best_metrics or trained.metrics).get(_FIRST_METRIC, math.nan),
    )
