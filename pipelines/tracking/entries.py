"""Write and find runs with a client, within MLflow's limits on names and values."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.storage.redaction import without_credentials
from pipelines.tracking.client import artifact_location

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run
    from mlflow.models import Model

logger = logging.getLogger(__name__)

MAX_PER_BATCH = 100
"""Params, or tags, that MLflow takes at once."""
RESTARTS_TAG = "num_restarts"
REASON_TAG = "failure_reason"
PLACE_TAG = "sovit.place"
ID_TAG = "sovit.id"
"""The id of a run's or a sweep's record: what decides whose a run is."""
MODEL_NAME = "model"
_MAX_EXPERIMENTS = 1000
_MAX_VALUE_CHARS = 500
_BAD_NAME_CHARS = re.compile(r"[^\w\-. :/]", re.ASCII)


def find_run(client: MlflowClient, *, run_id: str, id: str = "") -> Run | None:
    """Find a run to resume; None, with a warning, if it is gone.

    One whose tag names another record's `id` is not taken either.
    """
    if not run_id:
        return None
    run = active_run(client, run_id=run_id)
    if run is None:
        logger.warning("run %s is no longer in MLflow; starting another", run_id)
    elif id and run.data.tags.get(ID_TAG, id) != id:
        logger.warning("run %s in MLflow is another's; starting one", run_id)
        return None
    return run


def active_run(client: MlflowClient, *, run_id: str) -> Run | None:
    """Return a run; None if there is none, or it was deleted."""
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None
    return run if run.info.lifecycle_stage == "active" else None


def create_run(
    client: MlflowClient,
    *,
    uri: str,
    experiment: str,
    name: str,
    place: str,
    id: str = "",
) -> Run:
    """Create a run, and its experiment if that is new.

    `place` and `id` are tags of it from the start: see `placed_run`.
    """
    tags = {PLACE_TAG: value_text(place)} | ({ID_TAG: id} if id else {})
    found = client.get_experiment_by_name(experiment)
    if found is not None:
        return client.create_run(found.experiment_id, run_name=name, tags=tags)
    location = artifact_location(uri)
    try:
        created_id = client.create_experiment(experiment, artifact_location=location)
    except Exception:  # another driver may have created it since
        found = client.get_experiment_by_name(experiment)
        if found is None:
            raise
        created_id = found.experiment_id
    return client.create_run(created_id, run_name=name, tags=tags)


def own_run(client: MlflowClient, *, id: str) -> Run | None:
    """Find the run that was created for a record, in any experiment.

    A run's id is recorded only after its creation: a kill may come between the two.
    """
    experiments = client.search_experiments(max_results=_MAX_EXPERIMENTS)
    found = client.search_runs(
        [experiment.experiment_id for experiment in experiments],
        filter_string=f"tags.`{ID_TAG}` = '{id}'",
        max_results=1,
    )
    return next(iter(found), None)


def placed_run(
    client: MlflowClient, *, experiment: str, name: str, place: str
) -> Run | None:
    """Find the newest run that was created for a place, such as a trial of a sweep.

    For records of earlier versions too, which have no id.
    """
    found = client.get_experiment_by_name(experiment)
    if found is None or "'" in name:
        return None
    runs = client.search_runs(
        [found.experiment_id], filter_string=f"attributes.run_name = '{name}'"
    )
    wanted = value_text(place)
    return next((run for run in runs if run.data.tags.get(PLACE_TAG) == wanted), None)


def reopen_run(client: MlflowClient, *, run: Run) -> None:
    """Resume a run: RUNNING, no failure reason, one more restart counted."""
    client.update_run(run.info.run_id, status="RUNNING")
    num_restarts = int(run.data.tags.get(RESTARTS_TAG, "0")) + 1
    client.set_tag(run.info.run_id, RESTARTS_TAG, str(num_restarts))
    if REASON_TAG in run.data.tags:
        client.delete_tag(run.info.run_id, REASON_TAG)


def log_params(client: MlflowClient, *, run: Run, params: Mapping[str, object]) -> None:
    """Log params; those that MLflow refuses to change become tags."""
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


def upload_model(
    client: MlflowClient, *, run_id: str, folder: Path, described: Model
) -> str:
    """Upload a model folder as a logged model of a run; return its address."""
    from mlflow.entities import LoggedModelOutput
    from mlflow.models.model import MLMODEL_FILE_NAME

    run = client.get_run(run_id)
    model = client.create_logged_model(
        run.info.experiment_id,
        name=MODEL_NAME,
        source_run_id=run_id,
        params=run.data.params,
    )
    described.model_id = described.model_uuid = model.model_id
    described.artifact_path = model.artifact_location
    described.save(str(folder / MLMODEL_FILE_NAME))
    try:
        client.log_model_artifacts(model.model_id, str(folder))
    except Exception:
        client.finalize_logged_model(model.model_id, "FAILED")
        raise
    client.finalize_logged_model(model.model_id, "READY")
    client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=0)])
    return model.model_uri


def log_tags(client: MlflowClient, *, run_id: str, tags: Mapping[str, object]) -> None:
    """Log any number of tags."""
    from mlflow.entities import RunTag

    all_tags = [RunTag(name_text(key), value_text(tags[key])) for key in tags]
    for start in range(0, len(all_tags), MAX_PER_BATCH):
        batch = all_tags[start : start + MAX_PER_BATCH]
        client.log_batch(run_id, tags=batch, synchronous=True)


def name_text(name: str) -> str:
    """Replace each character that MLflow refuses in a name by `_`."""
    return _BAD_NAME_CHARS.sub("_", name)


def value_text(value: object) -> str:
    """Format a param's or tag's value: no passwords, at most 500 characters."""
    text = without_credentials(str(value))
    return text if len(text) <= _MAX_VALUE_CHARS else f"{text[: _MAX_VALUE_CHARS - 1]}…"
