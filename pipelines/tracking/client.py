"""Reach an MLflow store soon or not at all, within its limits on names and values."""

from __future__ import annotations

import logging
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, TypeVar

from pipelines.credentials import error_summary, without_credentials
from pipelines.tracking.sqlite_file import check_writable, sole_creator

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run
    from mlflow.models import Model

logger = logging.getLogger(__name__)

ADDRESS_VARIABLE = "MLFLOW_TRACKING_URI"
MAX_PER_BATCH = 100
"""Params, or tags, that MLflow takes at once."""
RESTARTS_TAG = "num_restarts"
REASON_TAG = "failure_reason"
MODEL_NAME = "model"
_MAX_VALUE_CHARS = 500
_BAD_NAME_CHARS = re.compile(r"[^\w\-. :/]", re.ASCII)
_SQLITE = "sqlite:///"
_DATABASE = "mlflow.db"
_ARTIFACTS = "mlartifacts"
PATIENCE = MappingProxyType(
    {"MLFLOW_HTTP_REQUEST_TIMEOUT": "6", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}
)
"""What a training waits for; MLflow's own 120 s and 7 tries make over ten minutes."""
NO_PROGRESS_BAR = MappingProxyType({"MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false"})
_TIMEOUT_S = 15.0

Result = TypeVar("Result")


def default_uri(storage: str) -> str:
    """Name the MLflow store of a storage folder: an SQLite file beside the runs.

    `MLFLOW_TRACKING_URI` wins where it is set. Raises ValueError for a bucket, since
    SQLite needs a filesystem.
    """
    if uri := os.environ.get(ADDRESS_VARIABLE):
        return uri
    if "://" in storage and not storage.startswith("file://"):
        raise ValueError(
            f"storage: wanted a folder to keep MLflow's {_DATABASE} in, came "
            f"{without_credentials(storage)!r}; set {ADDRESS_VARIABLE} to a server or "
            f"to {_SQLITE}/a/folder/{_DATABASE}"
        )
    folder = Path(storage.removeprefix("file://")).expanduser().absolute()
    return f"{_SQLITE}{folder / _DATABASE}"


def _artifact_location(uri: str) -> str | None:
    """Name the folder beside an SQLite store for artifacts; servers have their own.

    Left alone, a client of an SQLite file puts them in the working directory.
    """
    path = _sqlite_path(uri)
    return (path.parent / _ARTIFACTS).as_uri() if path else None


def attempt(
    call: Callable[[MlflowClient], Result],
    *,
    uri: str,
    otherwise: Result,
    loss: str,
    timeout_s: float = _TIMEOUT_S,
    settings: Mapping[str, str] = PATIENCE,
    create: bool = True,
) -> Result:
    """Call with a client; where that fails, warn what is lost and go on.

    A store that is no SQLite file, whose creation takes its time, gets `timeout_s`.
    Only the driver may `create` one: workers could be on another machine.
    """

    def connect_and_call() -> Result:
        with environment(settings):
            return call(connect(uri, create=create))

    is_file = uri.startswith(_SQLITE)
    try:
        return _within(None if is_file else timeout_s, call=connect_and_call)
    except Exception as error:  # MLflow lets requests', SQLAlchemy's and others through
        logger.warning(
            "MLflow at %s failed (%s); training goes on, %s",
            without_credentials(uri),
            error_summary(error),
            loss,
        )
        return otherwise


def _within(timeout_s: float | None, *, call: Callable[[], Result]) -> Result:
    """Call on a thread that is left behind, with TimeoutError, where it takes longer.

    Not every wait has a setting: names that don't resolve, databases that don't answer.
    """
    if timeout_s is None:
        return call()
    outcome: Future[Result] = Future()

    def run() -> None:
        try:
            outcome.set_result(call())
        except Exception as error:
            outcome.set_exception(error)

    threading.Thread(target=run, name="mlflow-call", daemon=True).start()
    try:
        return outcome.result(timeout_s)
    except TimeoutError as error:
        raise TimeoutError(f"no answer in {timeout_s:.0f} s") from error


@contextmanager
def environment(settings: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables, which MLflow reads at each call, for a while."""
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def connect(uri: str, *, create: bool) -> MlflowClient:
    """Give a client of a store that can be written; raise soon where it can't.

    MLflow tries for over 100 s to open an SQLite file that it can't open, and two
    processes that create one at the same time break it, so both are settled here.
    """
    # MLflow tells its makers how it is used, and us what it does to its tables, unless
    # told not to; who wants that sets it.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    from mlflow import MlflowClient

    path = _sqlite_path(uri)
    if path is None:
        return MlflowClient(tracking_uri=uri)
    if create:
        path.parent.mkdir(parents=True, exist_ok=True)
    elif not path.is_file():
        raise FileNotFoundError(
            f"wanted {path} on this machine, came none; workers on several machines "
            f"need a shared storage folder or a server in {ADDRESS_VARIABLE}"
        )
    check_writable(path)
    with sole_creator(path):
        return MlflowClient(tracking_uri=uri)


def find_run(client: MlflowClient, *, run_id: str) -> Run | None:
    """Find a run that can go on; None, with a warning, where it is gone."""
    if not run_id:
        return None
    run = active_run(client, run_id=run_id)
    if run is None:
        logger.warning("run %s is no longer in MLflow; starting another", run_id)
    return run


def active_run(client: MlflowClient, *, run_id: str) -> Run | None:
    """Get a run; None where there is none, or it was deleted."""
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None
    return run if run.info.lifecycle_stage == "active" else None


def create_run(client: MlflowClient, *, uri: str, experiment: str, name: str) -> Run:
    """Create a run, and its experiment where that is new."""
    found = client.get_experiment_by_name(experiment)
    if found is not None:
        return client.create_run(found.experiment_id, run_name=name)
    location = _artifact_location(uri)
    try:
        created_id = client.create_experiment(experiment, artifact_location=location)
    except Exception:  # another driver may have created it since
        found = client.get_experiment_by_name(experiment)
        if found is None:
            raise
        created_id = found.experiment_id
    return client.create_run(created_id, run_name=name)


def reopen_run(client: MlflowClient, *, run: Run) -> None:
    """Let a run go on: RUNNING, without a reason of failure, one more restart."""
    client.update_run(run.info.run_id, status="RUNNING")
    num_restarts = int(run.data.tags.get(RESTARTS_TAG, "0")) + 1
    client.set_tag(run.info.run_id, RESTARTS_TAG, str(num_restarts))
    if REASON_TAG in run.data.tags:
        client.delete_tag(run.info.run_id, REASON_TAG)


def log_params(client: MlflowClient, *, run: Run, params: Mapping[str, object]) -> None:
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


def upload_model(
    client: MlflowClient, *, run_id: str, folder: Path, described: Model
) -> str:
    """Keep a model folder as a logged model of a run; return its address."""
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
    """Write a name with the characters that MLflow takes, `_` for each other."""
    return _BAD_NAME_CHARS.sub("_", name)


def value_text(value: object) -> str:
    """Write a param's or tag's value without passwords, in at most 500 characters."""
    text = without_credentials(str(value))
    return text if len(text) <= _MAX_VALUE_CHARS else f"{text[: _MAX_VALUE_CHARS - 1]}…"


def _sqlite_path(uri: str) -> Path | None:
    if not uri.startswith(_SQLITE):
        return None
    return Path(uri.removeprefix(_SQLITE).partition("?")[0]).absolute()
