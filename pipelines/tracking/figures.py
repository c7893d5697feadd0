"""Draw figures and log them to MLflow from a background thread."""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory

from pipelines.storage.redaction import error_summary
from pipelines.tracking.runs import log_file

logger = logging.getLogger(__name__)
Draw = Callable[[Path], None]
_MAX_WAITING = 4


class FigureWriter:
    """Asynchronous logger of a run's figures as artifacts.

    Figures are drawn one at a time, in order. While a few are queued, since MLflow is
    slow, further ones are dropped with a warning. An empty run id logs none.

    Args:
        run_id: May be a call that waits for the run.
    """

    def __init__(self, uri: str, run_id: str | Callable[[], str]) -> None:
        self._uri, self._is_recorded = uri, bool(run_id)
        self._run_id = run_id if callable(run_id) else lambda: run_id
        self._waiting: queue.Queue[tuple[Draw, str] | None] = queue.Queue(_MAX_WAITING)
        self._thread: threading.Thread | None = None

    def log(self, draw: Draw, *, path: str) -> None:
        """Queue `draw`, which writes what is logged as `path`: a file or a folder."""
        if not self._is_recorded:
            return
        try:
            self._waiting.put_nowait((draw, path))
        except queue.Full:
            logger.warning("%s is left out: others are not kept yet", path)
            return
        if self._thread is None or not self._thread.is_alive():
            # A daemon: a store that hangs must not keep the process from ending.
            self._thread = threading.Thread(target=self._keep_all, daemon=True)
            self._thread.start()

    def close(self, timeout_s: float) -> None:
        """Wait at most `timeout_s` for the last figure."""
        if self._thread is not None:
            with contextlib.suppress(queue.Full):
                self._waiting.put(None, timeout=timeout_s)
            self._thread.join(timeout_s)

    def _keep_all(self) -> None:
        while (item := self._waiting.get()) is not None:
            draw, path = item
            self._keep(draw, PurePosixPath(path))

    def _keep(self, draw: Draw, path: PurePosixPath) -> None:
        try:
            with TemporaryDirectory() as scratch:
                file = Path(scratch) / path.name
                draw(file)
                folder = "" if path.parent == PurePosixPath() else str(path.parent)
                run_id = self._run_id()
                log_file(self._uri, run_id, file=file, folder=folder, create=False)
        except Exception as error:  # whatever drawing raises
            logger.warning("%s is left out: %s", path, error_summary(error))
