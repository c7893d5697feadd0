"""Record a training as one MLflow run, without ever failing because of MLflow.

The driver opens the run and hands its id to the workers; rank 0 of them writes metrics
by step with `MetricWriter`; the driver logs the model and ends the run. No function
here raises because of MLflow, none waits longer than about 15 seconds for a server
that is away, and an empty run id makes each of them do nothing.

Addresses lose their passwords before anything is stored or logged.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Literal
from urllib.parse import unquote, urlsplit

from pipelines.config.own_code import OwnCode
from pipelines.storage.redaction import without_credentials
from pipelines.tracking.client import attempt
from pipelines.tracking.entries import (
    MODEL_NAME,
    REASON_TAG,
    create_run,
    find_run,
    log_params,
    log_tags,
    own_run,
    placed_run,
    reopen_run,
    upload_model,
    value_text,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

logger = logging.getLogger(__name__)

_MAX_DIGEST_CHARS = 36
_UPLOAD_TIMEOUT_S = 600.0


def open_run(
    uri: str,
    *,
    experiment: str,
    name: str,
    params: Mapping[str, object],
    tags: Mapping[str, str],
    run_id: str = "",
    place: str = "",
    is_begun: bool = False,
    id: str = "",
) -> str:
    """Create a run, or reopen it after a restart; return its id.

    A run that is opened again is RUNNING again and counts its restarts in the tag
    `num_restarts`. Its params stay, as MLflow wants; one that has changed since is
    kept as a tag `resumed.<param>`. A run that is no longer there is created anew.
    `place` is the run's folder and `id` its record's; where the training `is_begun` and
    no run was noted, its driver may have been killed just before, so the record's run
    is looked for. A run of another record is left alone.

    Where MLflow is away, warns once and returns the id that it was given: "" for a new
    run, which is then not recorded; the metrics of an old one wait for MLflow.
    """

    def open_it(client: MlflowClient) -> Run | None:
        return find_or_create(
            client,
            uri=uri,
            experiment=experiment,
            name=name,
            run_id=run_id,
            place=place,
            is_begun=is_begun,
            id=id,
        )

    def describe(client: MlflowClient) -> None:
        assert run is not None
        log_params(client, run=run, params=params)
        log_tags(client, run_id=run.info.run_id, tags=tags)

    loss = f"run {run_id} isn't opened again" if run_id else "this training has no run"
    run = attempt(open_it, uri=uri, otherwise=None, loss=loss)
    if run is None:
        return run_id
    loss = "some of the run's params and tags are missing"
    attempt(describe, uri=uri, otherwise=None, loss=loss)
    return run.info.run_id


def find_or_create(
    client: MlflowClient,
    *,
    uri: str,
    experiment: str,
    name: str,
    run_id: str,
    place: str,
    is_begun: bool,
    id: str,
) -> Run:
    """Reopen a run, or create it: see `open_run`."""
    found = find_run(client, run_id=run_id, id=id)
    if found is None and is_begun and not run_id:
        found = (
            own_run(client, id=id)
            if id
            else placed_run(client, experiment=experiment, name=name, place=place)
        )
    if found is not None:
        reopen_run(client, run=found)
        return found
    return create_run(
        client, uri=uri, experiment=experiment, name=name, place=place, id=id
    )


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

    `context` is its purpose, such as `train` or `val`. Logging it again changes
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


def tag_run(uri: str, run_id: str, *, tags: Mapping[str, object]) -> None:
    """Set tags of a run, replacing those of the same names."""
    if run_id:
        attempt(
            lambda client: log_tags(client, run_id=run_id, tags=tags),
            uri=uri,
            otherwise=None,
            loss=f"the tags {', '.join(tags)} are missing",
        )


def log_text(uri: str, run_id: str, *, text: str, path: str) -> None:
    """Log a text as a run's artifact `path`, without any URL's password."""
    if run_id:
        attempt(
            lambda client: client.log_text(run_id, without_credentials(text), path),
            uri=uri,
            otherwise=None,
            loss=f"{path} is not recorded",
        )


def read_text(uri: str, run_id: str, *, path: str) -> str:
    """Read a text that `log_text` logged; "" if there is none, or MLflow is away."""

    def read(client: MlflowClient) -> str:
        from mlflow.exceptions import MlflowException

        with TemporaryDirectory() as folder:
            try:
                found = client.download_artifacts(run_id, path, folder)
            except (MlflowException, OSError):  # a run that kept no such file
                return ""
            return Path(found).read_text()

    if not run_id:
        return ""
    return attempt(read, uri=uri, otherwise="", loss=f"{path} is not read")


def artifact_file(uri: str, run_id: str, *, path: str) -> Path | None:
    """Find a run's artifact on this machine; None where it is not on it."""
    if not run_id:
        return None
    root = attempt(
        lambda client: client.get_run(run_id).info.artifact_uri or "",
        uri=uri,
        otherwise="",
        loss=f"{path} is not looked for",
        create=False,
    )
    place = urlsplit(root)
    file = Path(unquote(place.path), path)
    return file if place.scheme in ("", "file") and file.is_file() else None


def log_file(
    uri: str, run_id: str, *, file: Path, folder: str = "", create: bool = True
) -> None:
    """Log a file, such as a figure, as a run's artifact, its content unchanged.

    `create` makes an SQLite store that is not there: for the driver, not for workers.
    """
    if run_id:
        attempt(
            lambda client: client.log_artifact(run_id, str(file), folder or None),
            uri=uri,
            otherwise=None,
            loss=f"{file.name} is not recorded",
            create=create,
        )


def log_model(
    uri: str,
    run_id: str,
    *,
    checkpoint: Path,
    example: bytes,
    code: OwnCode | None = None,
) -> str:
    """Log a checkpoint's model (its moving average, if kept) as an MLflow model.

    `pipelines.tracking.model` describes its input and output. `example` is one encoded
    image, `code` the recipe file that registers the model, if any. Weights of hundreds
    of megabytes take their time, so this alone may wait for a server, ten minutes at
    most.

    Returns the model's address (`models:/m-...`), or "" where MLflow is away. Raises
    ValueError where the checkpoint is damaged.
    """
    loss = "the model is not recorded"
    is_there = run_id and attempt(
        lambda client: bool(client.get_run(run_id)), uri=uri, otherwise=False, loss=loss
    )
    if not is_there:
        return ""
    from mlflow.models import Model

    from pipelines.tracking.model import write_model

    with TemporaryDirectory() as scratch:
        folder = Path(scratch) / MODEL_NAME
        described = Model(run_id=run_id)
        write_model(
            folder,
            checkpoint=checkpoint,
            example=example,
            mlflow_model=described,
            code=code,
        )
        return attempt(
            lambda client: upload_model(
                client, run_id=run_id, folder=folder, described=described
            ),
            uri=uri,
            otherwise="",
            loss=loss,
            timeout_s=_UPLOAD_TIMEOUT_S,
            settings={},  # MLflow's own patience
        )


def end_run(
    uri: str,
    run_id: str,
    *,
    status: Literal["FINISHED", "FAILED", "KILLED"],
    reason: str = "",
) -> None:
    """Set a run's final status; a reason's first line goes to `failure_reason`."""

    def end(client: MlflowClient) -> None:
        if line := next(iter(reason.strip().splitlines()), ""):
            client.set_tag(run_id, REASON_TAG, value_text(line))
        client.set_terminated(run_id, status=status)

    if run_id:
        attempt(end, uri=uri, otherwise=None, loss=f"the run is not marked {status}")
