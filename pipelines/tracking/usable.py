"""Check before a training that MLflow can be used; else name the fix."""

from __future__ import annotations

import logging
import re
import sqlite3
import time
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.cli.outputs import why_no_folder
from pipelines.storage.redaction import error_summary, without_credentials
from pipelines.tracking.client import (
    ADDRESS_VARIABLE,
    PATIENCE,
    connect,
    environment,
    sqlite_path,
    within_time,
)
from pipelines.tracking.sqlite_file import is_made

if TYPE_CHECKING:
    from mlflow import MlflowClient

logger = logging.getLogger(__name__)

# A server in a container of its own has its name a moment after it has started.
_NAME_PATIENCE_S = 5.0
_POLL_S = 1.0
_MAX_CHECKED_BYTES = 64 << 20
_EXAMPLES = (
    f"set {ADDRESS_VARIABLE} to http://HOST:PORT or sqlite:////A/FOLDER/mlflow.db"
)
# What a server, or a database, says while it starts or is busy.
_PASSING = re.compile(
    r"database (\w+ )?is locked|has been held for a minute|no answer in|"
    r"refused|reset by peer|Connection aborted|RemoteDisconnected|"
    r"closed the connection|timed? ?out|Network is unreachable|No route to host|"
    r"is starting up|"
    r"too many (clients|connections|[45]\d\d error responses)|"
    r"error code (408|425|429|5\d\d)",
    re.IGNORECASE,
)
_UNKNOWN_NAME = re.compile(
    r"NameResolutionError|Name or service not known|name resolution|"
    r"nodename nor servname|No address associated with hostname",
    re.IGNORECASE,
)
_ADVICE = (
    (
        _UNKNOWN_NAME,
        f"mend the server's name in {ADDRESS_VARIABLE}",
    ),
    (
        re.compile("out-of-date database schema", re.I),
        "if an earlier MLflow wrote it, back it up and run `mlflow db upgrade "
        f"ADDRESS`; if a later one did, install that, or set {ADDRESS_VARIABLE} to "
        "another",
    ),
    (
        re.compile("duplicate column|already exists|no such (table|column)", re.I),
        "its making was cut off, or it is another program's; move it away, and a new "
        "one is made",
    ),
    (
        re.compile("not a database|malformed|disk image", re.I),
        "it is damaged: put a copy back, or move it away, and a new one is made",
    ),
    (
        re.compile("database or disk is full|No space left|Errno 28", re.I),
        "make room on its disk",
    ),
    (
        re.compile(
            "readonly|unable to open|Permission|Not a directory|File exists", re.I
        ),
        f"let this user write there, or set {ADDRESS_VARIABLE} to another",
    ),
    (
        re.compile("filesystem tracking backend", re.I),
        "MLflow no longer writes to folders of files: set "
        f"{ADDRESS_VARIABLE} to sqlite:////A/FOLDER/mlflow.db or a server",
    ),
    (
        re.compile("error code 40[13]|UNAUTHENTICATED|PERMISSION_DENIED", re.I),
        "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD",
    ),
    (
        re.compile("No module named", re.I),
        f"install that package, or {_EXAMPLES}",
    ),
)


def check_usable(uri: str, *, experiment: str) -> None:
    """Raise a one-line ValueError with the fix for what a retry won't cure.

    That is a deleted experiment, a store of another kind or version, one that is
    damaged or may not be written, an address with a mistake in it. A server that does
    not answer yet, and a database that is locked, pass with a warning. A store that is
    not there is not made yet.
    """
    deadline_s = time.monotonic() + _NAME_PATIENCE_S
    while True:
        try:
            within_time(lambda: _look(uri, experiment=experiment), uri=uri)
        except Exception as error:  # MLflow lets requests' and SQLAlchemy's through
            is_unknown = _UNKNOWN_NAME.search(str(error))
            if is_unknown and time.monotonic() < deadline_s:
                time.sleep(_POLL_S)
                continue
            refuse_unless_passing(error, uri=uri)
            logger.warning(
                "MLflow at %s is away (%s); its run is opened once it is back",
                without_credentials(uri),
                error_summary(error),
            )
        return


def refuse_unless_passing(error: Exception, *, uri: str) -> None:
    """Raise a ValueError with the fix for an error that a retry won't cure."""
    if isinstance(error, _RefusedError):
        raise ValueError(str(error)) from error
    text = f"{type(error).__name__}: {error}"
    if _PASSING.search(text) and not _UNKNOWN_NAME.search(text):
        return
    advice = next((said for known, said in _ADVICE if known.search(text)), _EXAMPLES)
    raise ValueError(
        f"expected an MLflow store to record in, got {without_credentials(uri)!r} "
        f"({error_summary(error)}); {advice}"
    ) from error


class _RefusedError(Exception):
    """Raised with a complete one-line message."""


def check_experiment(client: MlflowClient, *, name: str) -> None:
    """Raise ValueError where an experiment was deleted."""
    found = client.get_experiment_by_name(name)
    if found is not None and found.lifecycle_stage != "active":
        raise ValueError(
            f"expected an MLflow experiment to write to, got {name!r}, which was "
            "deleted; take it back with `mlflow experiments restore -x "
            f"{found.experiment_id}`, or set another --experiment"
        )


def _look(uri: str, *, experiment: str) -> None:
    path = sqlite_path(uri)
    if path is not None and not is_made(path):
        if why := why_no_folder(path.parent):
            raise OSError(why)
        return
    if path is not None and path.stat().st_size <= _MAX_CHECKED_BYTES:
        _check_pages(path)
    with environment(PATIENCE):
        client = connect(uri, create=False)
        try:
            check_experiment(client, name=experiment)
        except ValueError as error:
            raise _RefusedError(str(error)) from error


def _check_pages(path: Path) -> None:
    """Raise sqlite3.DatabaseError where a page of a database is damaged."""
    with closing(sqlite3.connect(path, timeout=0)) as connection:
        (found,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    if found != "ok":
        raise sqlite3.DatabaseError(f"database disk image is malformed: {found}")
