"""Connect to an MLflow store within a timeout, or fail."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import unquote

from pipelines.storage.filesystem import open_filesystem
from pipelines.storage.redaction import error_summary, without_credentials
from pipelines.tracking.sqlite_file import (
    check_writable,
    is_made,
    put_in_place,
    sole_creator,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient

logger = logging.getLogger(__name__)

ADDRESS_VARIABLE = "MLFLOW_TRACKING_URI"
_SQLITE = "sqlite:///"
_DATABASE = "mlflow.db"
ARTIFACTS = "mlartifacts"
PATIENCE = MappingProxyType(
    {"MLFLOW_HTTP_REQUEST_TIMEOUT": "6", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}
)
"""What a training waits for; MLflow's own 120 s and 7 tries make over ten minutes."""
_TIMEOUT_S = 15.0

Result = TypeVar("Result")


def default_uri(storage: str) -> str:
    """Return the MLflow URI of a storage folder: an SQLite file beside the runs.

    `MLFLOW_TRACKING_URI` wins where it is set. Raises ValueError for a bucket, since
    SQLite needs a filesystem.
    """
    if uri := os.environ.get(ADDRESS_VARIABLE):
        return uri
    if "://" in storage and not storage.startswith("file://"):
        raise ValueError(
            f"storage: expected a folder to keep MLflow's {_DATABASE} in, got "
            f"{without_credentials(storage)!r}; set {ADDRESS_VARIABLE} to a server or "
            f"to {_SQLITE}/a/folder/{_DATABASE}"
        )
    folder = Path(open_filesystem(storage)[1]).expanduser().absolute()
    return sqlite_uri(folder / _DATABASE)


def sqlite_uri(path: Path) -> str:
    """Build an SQLite file's URI for SQLAlchemy, its path escaped."""
    return _SQLITE + str(path).replace("%", "%25").replace("?", "%3F")


def artifact_location(uri: str) -> str | None:
    """Return the artifact folder beside an SQLite store; servers have their own.

    Left alone, a client of an SQLite file puts them in the working directory.
    """
    path = sqlite_path(uri)
    return (path.parent / ARTIFACTS).as_uri() if path else None


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
    """Call with a client; on failure, warn of the loss and return `otherwise`.

    A store that is no SQLite file, whose creation takes its time, gets `timeout_s`.
    Only the driver may `create` one: workers could be on another machine.
    """

    def connect_and_call() -> Result:
        with environment(settings), _no_other_folders(uri):
            return call(connect(uri, create=create))

    try:
        return within_time(connect_and_call, uri=uri, timeout_s=timeout_s)
    except Exception as error:  # MLflow lets requests', SQLAlchemy's and others through
        logger.warning(
            "MLflow at %s failed (%s); training goes on, %s",
            without_credentials(uri),
            error_summary(error),
            loss,
        )
        return otherwise


def within_time(
    call: Callable[[], Result], *, uri: str, timeout_s: float = _TIMEOUT_S
) -> Result:
    """Call on a thread; past the timeout, abandon it and raise TimeoutError.

    Not every wait has a setting: names that don't resolve, databases that don't answer.
    A SQLite file, whose creation takes its time, has all the time it needs.
    """
    if uri.startswith(_SQLITE):
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
    """Set environment variables temporarily; MLflow reads them at each call.

    Of threads that set the same value at a time, the first sets and restores it.
    """
    before = {
        name: os.environ.get(name)
        for name, value in settings.items()
        if os.environ.get(name) != value
    }
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
    """Connect to a store that can be written; raise quickly if it can't be.

    MLflow tries for over 100 s to open an SQLite file that it can't open, and two
    processes that create one at the same time break it, so both are settled here.
    """
    # MLflow tells its makers how it is used, and us what it does to its tables and each
    # small file that it copies, unless told not to; who wants that sets it.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    from mlflow import MlflowClient

    path = sqlite_path(uri)
    if path is None:
        return MlflowClient(tracking_uri=uri)
    if create:
        path.parent.mkdir(parents=True, exist_ok=True)
    elif not path.is_file():
        raise FileNotFoundError(
            f"expected {path} on this machine, got none; workers on several machines "
            f"need a shared storage folder or a server in {ADDRESS_VARIABLE}"
        )
    with sole_creator(path), _no_other_folders(uri):
        if not is_made(path):
            # Elsewhere first: MLflow can't go on with tables that a kill cut off.
            with put_in_place(path) as partial:
                MlflowClient(tracking_uri=sqlite_uri(partial))
        check_writable(path)
        return MlflowClient(tracking_uri=uri)


@contextmanager
def _no_other_folders(uri: str) -> Iterator[None]:
    """Delete the folder that MLflow makes when it takes a URI for a path."""
    path, taken = sqlite_path(uri), Path(uri.removeprefix(_SQLITE)).absolute().parent
    is_other = path is not None and taken != path.parent
    folders = [taken, *taken.parents] if is_other else []
    made = [folder for folder in folders if not folder.exists()]
    try:
        yield
    finally:
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()


def sqlite_path(uri: str) -> Path | None:
    """Return an SQLite store's file, None for a store of another kind."""
    if not uri.startswith(_SQLITE):
        return None
    return Path(unquote(uri.removeprefix(_SQLITE).partition("?")[0])).absolute()
