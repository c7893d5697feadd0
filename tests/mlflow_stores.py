"""Copy an empty MLflow store: creating one takes seconds."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from pathlib import Path

from pipelines.tracking import default_uri
from pipelines.tracking.client import connect, sqlite_path


def prepare_store(storage: str) -> str:
    """Copy a store to where runs of a storage folder expect it; return its URI."""
    uri = default_uri(storage)
    path = sqlite_path(uri)
    assert path is not None
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(_empty_store(), path)
    return uri


@functools.cache
def _empty_store() -> Path:
    folder = tempfile.mkdtemp(prefix="empty-mlflow-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path = Path(folder, "mlflow.db")
    connect(f"sqlite:///{path}", create=True).search_experiments()
    return path
