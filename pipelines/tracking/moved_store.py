"""Point a moved or copied SQLite store's artifacts to the folder beside it."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from urllib.parse import unquote, urlsplit

from pipelines.tracking.client import ARTIFACTS, artifact_location
from pipelines.tracking.sqlite_file import BUSY_TIMEOUT_S

# MLflow writes the whole address of the artifacts into each of these, and has no call
# that changes it.
_COLUMNS = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "storage_location"),
)


def follow_move(uri: str, *, path: Path) -> None:
    """Replace the artifact folder of a store's earlier location.

    A copied store changes only if its artifacts were copied too. Raises
    sqlite3.Error where the store can't be written.
    """
    here = artifact_location(uri)
    assert here is not None
    with closing(sqlite3.connect(path, timeout=BUSY_TIMEOUT_S)) as connection:
        for old in list(_places(connection)):
            if old == here or not _has_moved(old, path=path):
                continue
            for table, column in _COLUMNS:
                with contextlib.suppress(sqlite3.OperationalError):  # other versions
                    connection.execute(
                        f"UPDATE {table} SET {column} = ? || substr({column}, ?) "
                        f"WHERE {column} = ? OR substr({column}, 1, ?) = ?",
                        (here, len(old) + 1, old, len(old) + 1, f"{old}/"),
                    )
        connection.commit()


def _places(connection: sqlite3.Connection) -> Iterator[str]:
    rows = connection.execute("SELECT DISTINCT artifact_location FROM experiments")
    for (place,) in rows:
        if place and place.startswith("file://") and place.endswith(f"/{ARTIFACTS}"):
            yield place


def _has_moved(place: str, *, path: Path) -> bool:
    store = Path(unquote(urlsplit(place).path)).with_name(path.name)
    return not store.exists() or path.with_name(ARTIFACTS).is_dir()
