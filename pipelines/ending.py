"""Answer SIGTERM, the word of schedulers and spot markets, with an orderly end."""

from __future__ import annotations

import contextlib
import logging
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def noted_sigterm(*, is_wanted: bool = True) -> Iterator[threading.Event]:
    """Give an event that SIGTERM sets, instead of ending the process.

    The second one ends it. Where that is not wanted, and in other threads than the main
    one, for which Python can't do this, the event is never set.
    """
    is_over = threading.Event()
    if not is_wanted or threading.current_thread() is not threading.main_thread():
        yield is_over
        return

    def note(number: int, frame: FrameType | None) -> None:
        if is_over.is_set():
            sys.exit(128 + number)
        logger.info("asked to end: writing a checkpoint first")
        is_over.set()

    before = signal.signal(signal.SIGTERM, note)
    try:
        yield is_over
    finally:
        signal.signal(signal.SIGTERM, before)
