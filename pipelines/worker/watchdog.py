"""Kill a worker that hangs, so that its launcher can restart it.

A thread that waits forever for a collective, a decoder or a file system raises no
error. From outside it looks like a busy one, so it is watched from inside; a process
that is stopped as a whole is found by Ray's own health check.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from pipelines.data.batch import Batch

EXIT_CODE = 75
"""What a worker that was ended for hanging leaves: sysexits' EX_TEMPFAIL."""
_LOOKS_PER_TIMEOUT = 20
# Before a set's first batch readers are started, with it graphs are compiled: tens of
# seconds on a busy machine.
_START_S = 120.0
# What is told travels on a thread of Ray's.
_TELL_S = 0.5


@dataclass(frozen=True, kw_only=True)
class _Wait:
    """What the training thread is doing, since when, and its time limit."""

    doing: str
    since_s: float
    limit_s: float

    @property
    def is_over(self) -> bool:
        return time.monotonic() - self.since_s >= self.limit_s


class Watchdog:
    """Thread that watches this process's training thread for a timeout.

    Args:
        timeout_s: Longest time without a step; 0 is no limit. The first of training,
            and of each evaluation, may always take two minutes.
        tell: Called with a line on the last activity before the process ends.
        end: Ends the process.
    """

    def __init__(
        self,
        timeout_s: float,
        *,
        tell: Callable[[str], None],
        end: Callable[[int], object] = os._exit,
    ) -> None:
        self._timeout_s, self._tell, self._end = timeout_s, tell, end
        self._wait: _Wait | None = None
        self._is_closed = threading.Event()

    def __enter__(self) -> Watchdog:
        if self._timeout_s:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_closed.set()

    def watching(self, batches: Iterable[Batch], *, doing: str) -> Iterator[Batch]:
        """Yield the batches, with a timeout on each wait and on each step."""
        iterator = iter(batches)
        limit_s = max(self._timeout_s, _START_S)
        try:
            while True:
                self._begin("waiting for images", limit_s=limit_s)
                batch = next(iterator, None)
                self._begin(doing, limit_s=limit_s)
                if batch is None:
                    return
                yield batch
                limit_s = self._timeout_s
        finally:
            self._wait = None

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Suspend the timeout for a slow operation, such as writing a checkpoint."""
        before, self._wait = self._wait, None
        yield
        if before is not None:
            self._wait = dataclasses.replace(before, since_s=time.monotonic())

    def overdue(self) -> str:
        """Return a line on the operation that exceeds its time limit, or ""."""
        wait = self._wait
        if wait is None or not wait.is_over:
            return ""
        return f"no step for {wait.limit_s:g} s ({wait.doing}); ended"

    def _begin(self, doing: str, *, limit_s: float) -> None:
        self._wait = _Wait(doing=doing, since_s=time.monotonic(), limit_s=limit_s)

    def _watch(self) -> None:
        while not self._is_closed.wait(self._timeout_s / _LOOKS_PER_TIMEOUT):
            if not (line := self.overdue()):
                continue
            # Whatever becomes of the words, it ends.
            with contextlib.suppress(Exception):
                self._tell(line)
                # Where every thread stands, for whoever reads the worker's log.
                faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
                time.sleep(_TELL_S)
            self._end(EXIT_CODE)
            return
