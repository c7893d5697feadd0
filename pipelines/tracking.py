"""Keep a training as one MLflow run, and train on where MLflow is away.

The driver opens the run and hands its id to the workers; rank 0 of them writes metrics
by step with `MetricWriter`; the driver logs the model and ends the run. No function
here raises because of MLflow, none waits longer than about 15 seconds for a server
that is away, and an empty run id makes each of them do nothing.

Addresses lose their passwords before anything is stored or logged.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pipelines.metric_buffer import MetricBuffer, Point, RefusedError
from pipelines.mlflow_client import (
    MAX_PER_BATCH,
    artifact_location,
    attempt,
    connect,
    default_uri,
    log_tags,
    name_text,
    patience,
    value_text,
)
from pipelines.provenance import without_credentials

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

__all__ = [
    "MetricWriter",
    "default_uri",
    "end_run",
    "log_dataset",
    "log_file",
    "log_text",
    "open_run",
]

logger = logging.getLogger(__name__)

RESTARTS_TAG = "num_restarts"
REASON_TAG = "failure_reason"
_MAX_DIGEST_CHARS = 36


def open_run(
    uri: str,
    *,
    experiment: str,
    name: str,
    params: Mapping[str, object],
    tags: Mapping[str, str],
    run_id: str = "",
) -> str:
    """Create a run, or open one again after a restart, and return its id.

    A run that is opened again is RUNNING again and counts its restarts in the tag
    `num_restarts`. Its params stay, as MLflow wants; one that has changed since is
    kept as a tag `resumed.<param>`. A run that is no longer there is created anew.

    Returns "" and warns once where MLflow is away.
    """

    def open_it(client: MlflowClient) -> Run | None:
        if found := _find_run(client, run_id=run_id):
            _reopen(client, run=found)
            return found
        return _create_run(client, uri=uri, experiment=experiment, name=name)

    def describe(client: MlflowClient) -> None:
        assert run is not None
        _log_params(client, run=run, params=params)
        log_tags(client, run_id=run.info.run_id, tags=tags)

    run = attempt(open_it, uri=uri, otherwise=None, loss="this training has no run")
    if run is None:
        return ""
    loss = "some of the run's params and tags are missing"
    attempt(describe, uri=uri, otherwise=None, loss=loss)
    return run.info.run_id


def log_dataset(
    uri: str,
    run_id: str,
    *,
    name: str,
    source: str,
    num_rows: int,
    num_shards: int,
    digest: str,
    context: str,
) -> None:
    """Record a shard set as a dataset input of a run, and its counts as tags.

    `context` says what it was for, such as `train` or `val`. Logging it again changes
    nothing. MLflow keeps 36 characters of a digest; the tag keeps them all.
    """
    source = without_credentials(source)
    counts = {"num_rows": num_rows, "num_shards": num_shards}

    def log(client: MlflowClient) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        dataset = Dataset(
            name=name,
            digest=digest[:_MAX_DIGEST_CHARS],
            source_type=source.partition("://")[0] if "://" in source else "local",
            source=json.dumps({"uri": source}),
            profile=json.dumps(counts),
        )
        context_tag = InputTag("mlflow.data.context", context)
        client.log_inputs(run_id, [DatasetInput(dataset, [context_tag])])
        facts = {"source": source, "digest": digest, **counts}
        tags = {f"data.{context}.{fact}": value for fact, value in facts.items()}
        log_tags(client, run_id=run_id, tags=tags)

    if run_id:
        attempt(log, uri=uri, otherwise=None, loss=f"dataset {name} is not recorded")


def log_text(uri: str, run_id: str, *, text: str, path: str) -> None:
    """Keep a text as the artifact `path` of a run, without any address's password."""
    if run_id:
        attempt(
            lambda client: client.log_text(run_id, without_credentials(text), path),
            uri=uri,
            otherwise=None,
            loss=f"{path} is not recorded",
        )


def log_file(uri: str, run_id: str, *, file: Path, folder: str = "") -> None:
    """Keep a file, a figure say, as an artifact of a run; its content goes as it is."""
    if run_id:
        attempt(
            lambda client: client.log_artifact(run_id, str(file), folder or None),
            uri=uri,
            otherwise=None,
            loss=f"{file.name} is not recorded",
        )


def end_run(
    uri: str,
    run_id: str,
    *,
    status: Literal["FINISHED", "FAILED", "KILLED"],
    reason: str = "",
) -> None:
    """Give a run its last state; a reason's first line goes to `failure_reason`."""

    def end(client: MlflowClient) -> None:
        if line := next(iter(reason.strip().splitlines()), ""):
            client.set_tag(run_id, REASON_TAG, value_text(line))
        client.set_terminated(run_id, status=status)

    if run_id:
        attempt(end, uri=uri, otherwise=None, loss=f"the run is not marked {status}")


class MetricWriter:
    """Write a run's metrics by step, without ever stopping the training loop.

    Points are sent by a thread of their own and wait, the newest 100 000 of them, while
    MLflow is away. After a restart from an earlier checkpoint some steps are logged
    twice: MLflow keeps both points, each with its time. Charts are drawn by step, so
    such a step shows two values, and a metric's last value is that of the highest step,
    the later point where two have it: right as soon as training has passed the point it
    had come to before. `num_restarts` says that it happened.
    """

    def __init__(self, uri: str, run_id: str) -> None:
        self._uri = uri
        self._run_id = run_id
        self._warned = False
        self._buffer = MetricBuffer(self._send, place=f"MLflow at {uri}")

    def log(self, metrics: Mapping[str, float], *, step: int) -> None:
        """Queue one value of each metric at a step; never raises, never waits.

        Characters that MLflow refuses in a name become `_`. What is no number is left
        out, with one warning.
        """
        if not self._run_id:
            return
        now_ms = int(time.time() * 1000)
        points = []
        for name, value in metrics.items():
            try:
                points.append(Point(name_text(name), float(value), int(step), now_ms))
            except (TypeError, ValueError) as error:
                if not self._warned:
                    logger.warning("metric %r is left out: %s", name, error)
                self._warned = True
        self._buffer.add(points)

    def close(self, timeout_s: float) -> int:
        """Flush for at most `timeout_s`; return how many points were not written."""
        num_lost = self._buffer.close(timeout_s)
        if num_lost:
            place = without_credentials(self._uri)
            logger.warning("MLflow at %s: %d points not written", place, num_lost)
        return num_lost

    def _send(self, points: Sequence[Point]) -> None:
        with patience():
            from mlflow.entities import Metric
            from mlflow.exceptions import MlflowException

            client = connect(self._uri, create=False)
            metrics = [
                Metric(point.key, point.value, point.timestamp_ms, point.step)
                for point in points
            ]
            try:
                client.log_batch(self._run_id, metrics=metrics, synchronous=True)
            except MlflowException as error:
                if error.error_code == "INVALID_PARAMETER_VALUE":
                    raise RefusedError(str(error)) from error
                raise


def _find_run(client: MlflowClient, *, run_id: str) -> Run | None:
    """Find a run that can go on; None where there is none, or it was deleted."""
    from mlflow.exceptions import MlflowException

    if not run_id:
        return None
    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        run = None
    if run is None or run.info.lifecycle_stage != "active":
        logger.warning("run %s is no longer in MLflow; starting another", run_id)
        return None
    return run


def _create_run(client: MlflowClient, *, uri: str, experiment: str, name: str) -> Run:
    found = client.get_experiment_by_name(experiment)
    if found is not None:
        return client.create_run(found.experiment_id, run_name=name)
    location = artifact_location(uri)
    try:
        created_id = client.create_experiment(experiment, artifact_location=location)
    except Exception:  # another driver may have created it since
        found = client.get_experiment_by_name(experiment)
        if found is None:
            raise
        created_id = found.experiment_id
    return client.create_run(created_id, run_name=name)


def _reopen(client: MlflowClient, *, run: Run) -> None:
    client.update_run(run.info.run_id, status="RUNNING")
    num_restarts = int(run.data.tags.get(RESTARTS_TAG, "0")) + 1
    client.set_tag(run.info.run_id, RESTARTS_TAG, str(num_restarts))
    if REASON_TAG in run.data.tags:
        client.delete_tag(run.info.run_id, REASON_TAG)


def _log_params(
    client: MlflowClient, *, run: Run, params: Mapping[str, object]
) -> None:
    """Log params; those that MLflow no longer lets us change become tags."""
    from mlflow.entities import Param

    run_id, known = run.info.run_id, run.data.params
    texts = {name_text(name): value_text(value) for name, value in params.items()}
    new = [Param(key, text) for key, text in texts.items() if key not in known]
    for start in range(0, len(new), MAX_PER_BATCH):
        batch = new[start : start + MAX_PER_BATCH]
        client.log_batch(run_id, params=batch, synchronous=True)
    changed = {
        f"resumed.{key}": text
        for key, text in texts.items()
        if known.get(key, text) != text
    }
    log_tags(client, run_id=run_id, tags=changed)
