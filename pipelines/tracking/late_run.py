"""Open a training's MLflow run now, or once MLflow is back."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from pipelines.storage.redaction import without_credentials
from pipelines.tracking.client import (
    PATIENCE,
    connect,
    environment,
    sqlite_path,
    within_time,
)
from pipelines.tracking.entries import log_params, log_tags
from pipelines.tracking.moved_store import follow_move
from pipelines.tracking.runs import end_run, find_or_create
from pipelines.tracking.usable import check_experiment, refuse_unless_passing

if TYPE_CHECKING:
    from mlflow.entities import Run

logger = logging.getLogger(__name__)

_FIRST_RETRY_S = 0.5
_LAST_RETRY_S = 4.0
_END_PATIENCE_S = 15.0
_POLL_S = 0.5


class NotOpenYetError(Exception):
    """Raised when MLflow has been unreachable since the training began."""


class LateRun:
    """A training's MLflow run, opened at the start or later in the background.

    Records for it are queued in order until then: they are lost only with the process.

    Args:
        run: What `find_or_create` takes.
        on_open: Called with the run's id, by whichever thread opens it.
    """

    def __init__(
        self,
        uri: str,
        *,
        params: Mapping[str, object],
        tags: Mapping[str, str],
        run: Mapping[str, Any],
        on_open: Callable[[str], None] = lambda run_id: None,
    ) -> None:
        self._uri, self._params, self._tags = uri, params, tags
        self._settings, self._on_open = run, on_open
        self._run: Run | None = None
        self._opened = threading.Event()
        self._is_over = threading.Event()
        self._waiting: deque[Callable[[str], None]] = deque()
        self._lock = threading.Lock()

    @property
    def is_open(self) -> bool:
        """Whether MLflow has the run."""
        return self._opened.is_set()

    @property
    def run_id(self) -> str:
        """The run's id; "" while it isn't open."""
        return self._run.info.run_id if self.is_open and self._run else ""

    def needed_id(self) -> str:
        """Return the run's id, or raise NotOpenYetError."""
        if not self.is_open:
            raise NotOpenYetError("the run is not open yet")
        return self.run_id

    def open(self, *, is_demanded: bool) -> None:
        """Open the run, or start retrying in the background.

        Raises ValueError, if that `is_demanded`, for errors that a retry won't fix.
        """
        try:
            self._open_once()
        except Exception as error:  # MLflow lets requests' and SQLAlchemy's through
            if is_demanded:
                refuse_unless_passing(error, uri=self._uri)
            logger.warning(
                "MLflow at %s is away; training goes on, and what is to be recorded "
                "waits until it is back",
                without_credentials(self._uri),
            )
            again = threading.Thread(target=self._try_again, name="late-run")
            again.daemon = True
            again.start()
        else:
            self._settle()

    def do(self, call: Callable[[str], None]) -> None:
        """Call with the run's id: now, or in order once the run is open."""
        with self._lock:
            if not self.is_open:
                self._waiting.append(call)
                return
        call(self.run_id)

    def awaited_id(self) -> str:
        """Return the run's id, waiting for it without a timeout."""
        self._opened.wait()
        return self.run_id

    def wait(self, timeout_s: float, *, until: threading.Event | None = None) -> bool:
        """Wait until the run is open or the event is set; return whether it is open."""
        if not self.is_open:
            place = without_credentials(self._uri)
            logger.info("waiting for MLflow at %s, up to %.0f s", place, timeout_s)
        deadline_s = time.monotonic() + timeout_s
        while (left_s := deadline_s - time.monotonic()) > 0:
            is_asked = until is not None and until.is_set()
            if is_asked or self._opened.wait(min(left_s, _POLL_S)):
                break
        return self.is_open

    def end(
        self, *, status: Literal["FINISHED", "FAILED", "KILLED"], reason: str = ""
    ) -> None:
        """Write the run's final status; wait a while for an unreachable MLflow."""
        self.do(lambda id: end_run(self._uri, id, status=status, reason=reason))
        self.wait(_END_PATIENCE_S)
        self._is_over.set()

    def _try_again(self) -> None:
        wait_s = _FIRST_RETRY_S
        while not self._is_over.wait(wait_s):
            try:
                self._open_once()
                self._settle()
            except Exception:  # the run's folder may be away too
                wait_s = min(2 * wait_s, _LAST_RETRY_S)
            else:
                place = without_credentials(self._uri)
                logger.warning("MLflow at %s is back: run %s", place, self.run_id)
                return

    def _open_once(self) -> None:
        within_time(self._open, uri=self._uri)

    def _settle(self) -> None:
        """Record the run's id, and make the calls that were queued for it."""
        assert self._run is not None
        run_id = self._run.info.run_id
        self._on_open(run_id)
        while True:
            with self._lock:
                if not self._waiting:
                    self._opened.set()
                    return
                call = self._waiting.popleft()
            call(run_id)

    def _open(self) -> None:
        with environment(PATIENCE):
            client = connect(self._uri, create=True)
            if self._run is None:
                if (path := sqlite_path(self._uri)) is not None:
                    follow_move(self._uri, path=path)
                check_experiment(client, name=self._settings["experiment"])
                self._run = find_or_create(client, uri=self._uri, **self._settings)
            log_params(client, run=self._run, params=self._params)
            log_tags(client, run_id=self._run.info.run_id, tags=self._tags)
