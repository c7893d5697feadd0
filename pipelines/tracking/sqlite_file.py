"""Check that an SQLite file can be written, and serialise its creation."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from pipelines.storage.path import PARTIAL_SUFFIX, partial_name

BUSY_TIMEOUT_S = 6
_CREATION_TIMEOUT_S = 60
_POLL_S = 0.1


def is_made(path: Path) -> bool:
    """Check whether a database exists: an empty file is none yet."""
    return path.exists() and path.stat().st_size > 0


@contextmanager
def put_in_place(path: Path) -> Iterator[Path]:
    """Create a database under a temporary name, and rename it once it is whole.

    One that someone else has made meanwhile stays. What a killed maker left is deleted.
    For who is the `sole_creator`.
    """
    for left in path.parent.glob(f"{glob.escape(path.name)}.*{PARTIAL_SUFFIX}*"):
        left.unlink(missing_ok=True)
    partial = Path(partial_name(str(path)))
    try:
        yield partial
        if path.exists() and not is_made(path):
            os.replace(partial, path)
        elif not path.exists():
            _move_to_nothing(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _move_to_nothing(partial: Path, path: Path) -> None:
    with contextlib.suppress(FileExistsError):
        try:
            os.link(partial, path)
        except FileExistsError:
            raise
        except OSError:  # a file system without hard links
            os.replace(partial, path)


def check_writable(path: Path) -> None:
    """Raise sqlite3.OperationalError where a file can't be written within 6 seconds."""
    with closing(sqlite3.connect(path, timeout=BUSY_TIMEOUT_S)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        connection.rollback()


@contextmanager
def sole_creator(path: Path) -> Iterator[None]:
    """Serialise the creation of a database's tables; others wait a minute.

    Uses a lock file beside it, since the tables' creator takes SQLite's own lock.
    Raises TimeoutError.
    """
    deadline_s = time.monotonic() + _CREATION_TIMEOUT_S
    with path.with_name(f"{path.name}.lock").open("w") as lock:
        while not _locked(lock.fileno()):
            if time.monotonic() > deadline_s:
                raise TimeoutError(f"{lock.name} has been held for a minute")
            time.sleep(_POLL_S)
        yield  # closing the file gives the lock back


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
