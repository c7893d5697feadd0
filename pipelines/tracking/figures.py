"""Draw figures and keep them in MLflow, on a thread of their own."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory

from pipelines.credentials import error_summary
from pipelines.tracking.runs import log_file

logger = logging.getLogger(__name__)


class FigureWriter:
    """Keep a run's figures as artifacts; training never waits for them.

    One is drawn at a time: a figure that comes while MLflow is slow with the one before
    is left out, with a warning. An empty run id keeps none.
    """

    def __init__(self, uri: str, run_id: str) -> None:
        self._uri, self._run_id = uri, run_id
        self._thread: threading.Thread | None = None

    def log(self, draw: Callable[[Path], None], *, path: str) -> None:
        """Let `draw` write a file, and keep it as the artifact `path`; never raises."""
        if not self._run_id:
            return
        if self._thread is not None and self._thread.is_alive():
            logger.warning("%s is left out: the figure before is not kept yet", path)
            return
        # A daemon: a store that hangs must not keep the process from ending.
        self._thread = threading.Thread(
            target=self._keep, args=(draw, PurePosixPath(path)), daemon=True
        )
        self._thread.start()

    def close(self, timeout_s: float) -> None:
        """Wait for the last figure, for at most `timeout_s`."""
        if self._thread is not None:
            self._thread.join(timeout_s)

    def _keep(self, draw: Callable[[Path], None], path: PurePosixPath) -> None:
        try:
            with TemporaryDirectory() as scratch:
                file = Path(scratch) / path.name
                draw(file)
                folder = "" if path.parent == PurePosixPath() else str(path.parent)
                log_file(
                    self._uri, self._run_id, file=file, folder=folder, create=False
                )
        except Exception as error:  # whatever drawing raises
            logger.warning("%s is left out: %s", path, error_summary(error))
