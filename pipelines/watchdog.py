"""End a worker that hangs, so that what started it can start another.

A thread that waits for a collective, a decoder or a file system for ever raises
nothing. Nobody else can tell it from one that is busy, so it is watched from inside; a
process that is stopped as a whole is found by Ray's own health check.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator

from pipelines.ingest.batch import Batch

EXIT_CODE = 75
"""What a worker that was ended for hanging leaves: sysexits' EX_TEMPFAIL."""
_LOOKS_PER_TIMEOUT = 20


class Watchdog:
    """Watch this process's training thread from a thread of its own.

    Args:
        timeout_s: How long it may make no step; 0 never ends it.
        tell: Gets a line that says what it did last, before the process ends.
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
        self._last: tuple[float, str] | None = None
        self._is_closed = threading.Event()

    def __enter__(self) -> Watchdog:
        if self._timeout_s:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_closed.set()

    def watching(self, batches: Iterable[Batch], *, doing: str) -> Iterator[Batch]:
        """Give the batches; from one to the next no more time may pass than is set."""
        iterator = iter(batches)
        try:
            while True:
                self._last = (time.monotonic(), "waiting for images")
                batch = next(iterator, None)
                self._last = (time.monotonic(), doing)
                if batch is None:
                    return
                yield batch
        finally:
            self._last = None

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Let something take as long as it takes: a store that is slow, a report."""
        before, self._last = self._last, None
        yield
        if before is not None:
            self._last = (time.monotonic(), before[1])

    def _watch(self) -> None:
        while not self._is_closed.wait(self._timeout_s / _LOOKS_PER_TIMEOUT):
            last = self._last
            if last is None or time.monotonic() - last[0] < self._timeout_s:
                continue
            self._tell(f"no step for {self._timeout_s:.0f} s ({last[1]}); ended")
            # Where every thread stands, for whoever reads the worker's log.
            faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
            self._end(EXIT_CODE)
            return
