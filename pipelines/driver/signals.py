"""Handle Ctrl-C, SIGTERM and SIGHUP with an orderly end.

They come from a person, from schedulers and spot markets, and from a closed terminal:
all three ask for the same. While a run trains, the first one asks for a checkpoint and
an end, the second ends it at once. Where there is nothing to keep the first one ends
it, and while a record is being written it waits until that is whole.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import Literal

from pipelines.errors import CHECKPOINTED, InterruptedRun

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
Answer = Literal["end", "note", "wait"]
# `timeout` and some shells signal a process and then its group: that asks once.
ECHO_S = 0.5
_MOST_SIGNALS = 4096
_HOUR_S = 3600.0


class StopRequest:
    """Signals this process has received, and its current way of handling them."""

    def __init__(self) -> None:
        self.event = threading.Event()
        """Set once the process is asked to end."""
        self.begun = threading.Event()
        """To be set once there is something to keep."""
        self._number, self._reason = signal.SIGTERM, ""
        self._start_s = time.monotonic()
        self._asked_s = -math.inf
        self._answer: Answer = "end"
        self._answered: tuple[int, ...] = ()
        self._came: int | None = None  # a pipe's end, from which signals are read
        self._terminals = [fd for fd in (0, 1, 2) if _is_terminal(fd)]

    def arm(self) -> None:
        """Reinstall the handlers after a library replaced them, as `ray.init` does.

        Those that `stop_requests` leaves alone stay so. Raises as `check` does.
        """
        for number in self._answered:
            signal.signal(number, self.handle)
        self.check()

    @contextlib.contextmanager
    def answering(self, numbers: Iterable[int]) -> Iterator[None]:
        """Handle these signals within a block; note those that a library handles.

        An exception of a handler may get lost: Python ignores it within a finalizer.
        """
        self._answered = tuple(numbers)
        reader, writer = os.pipe()
        os.set_blocking(reader, False)
        os.set_blocking(writer, False)
        wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        handlers = {number: signal.getsignal(number) for number in self._answered}
        self._came = reader
        try:
            with self.restored():
                self.arm()
                yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(wakeup)
            self._came = None
            os.close(reader)
            os.close(writer)

    @contextlib.contextmanager
    def noted(self) -> Iterator[threading.Event]:
        """Only set the event on a signal in this block, once `begun` is set.

        The second signal ends the process at once.
        """
        with self._answering("note"):
            yield self.event

    @contextlib.contextmanager
    def timed(self, hours: float) -> Iterator[None]:
        """Set the event in this block so many hours after the start; 0 never does."""
        if not hours:
            yield
            return
        left_s = hours * _HOUR_S - (time.monotonic() - self._start_s)
        timer = threading.Timer(max(left_s, 0.0), self._expire, [hours])
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Defer signals until the block is done; see `check`."""
        with self._answering("wait"):
            yield

    def finish(self) -> None:
        """Defer signals for good: only exiting is left."""
        self._answer = "wait"

    def check(self) -> None:
        """Raise as the signal would have, if one has come in the meantime."""
        self._note_what_came()
        if self.event.is_set():
            raise self._interruption()

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """Restore the signal's own exception where Ray replaced it by a SystemExit.

        Its own handler of SIGTERM does, and so does its C++ code with whatever a
        handler raises while it waits.
        """
        try:
            yield
        except SystemExit as error:
            self._note_what_came()
            is_known = error.code in (CHECKPOINTED, 128 + self._number)
            if is_known or not self.event.is_set():
                raise
            raise self._interruption() from error

    @property
    def name(self) -> str:
        """What asks for the end: the signal that came last, or the time."""
        return self._reason or signal.Signals(self._number).name

    @contextlib.contextmanager
    def _answering(self, answer: Answer) -> Iterator[None]:
        before, self._answer = self._answer, answer
        try:
            yield
        finally:
            self._answer = before

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal, in the main thread."""
        if number == signal.SIGHUP:
            self._leave_terminals()
        now_s = time.monotonic()
        if now_s - self._asked_s < ECHO_S and number == self._number:
            return
        # A scheduler's signal may come soon after the time that it was told to us.
        is_again = self.event.is_set() and not self._reason
        self._number, self._asked_s = signal.Signals(number), now_s
        self._reason = ""
        self.event.set()
        is_end = is_again or not self.begun.is_set()
        if self._answer == "end" or (self._answer == "note" and is_end):
            raise self._interruption()
        if self._answer == "note":
            _say(f"{self.name}: writing a checkpoint, then ending; again: at once")

    def _expire(self, hours: float) -> None:
        if not self.event.is_set():
            self._reason = f"--max-hours {hours:g}"
            self.event.set()
            _say(f"{self._reason}: writing a checkpoint, then ending")

    def _note_what_came(self) -> None:
        if self._came is None or self.event.is_set():
            return
        with contextlib.suppress(BlockingIOError):
            for number in os.read(self._came, _MOST_SIGNALS):
                if number in self._answered:
                    self._number = signal.Signals(number)
                    self.event.set()

    def _interruption(self) -> BaseException:
        if self._number == signal.SIGINT:
            return KeyboardInterrupt()
        return InterruptedRun(f"ended by {self.name}", status=128 + self._number)

    def _leave_terminals(self) -> None:
        """Redirect terminals to /dev/null: writing to a closed one fails."""
        nowhere = os.open(os.devnull, os.O_RDWR)
        for terminal in self._terminals:
            os.dup2(nowhere, terminal)
        os.close(nowhere)


@contextlib.contextmanager
def stop_requests(*, is_wanted: bool = True) -> Iterator[StopRequest]:
    """Handle signals during a block.

    Signals that are ignored, as under nohup, stay so. Where it is not wanted, and in
    other threads than the main one, for which Python can't do this, all are left alone.
    """
    stop = StopRequest()
    if not is_wanted or threading.current_thread() is not threading.main_thread():
        yield stop
        return
    ignored = [n for n in SIGNALS if signal.getsignal(n) == signal.SIG_IGN]
    with stop.answering(n for n in SIGNALS if n not in ignored):
        yield stop


def _is_terminal(descriptor: int) -> bool:
    try:
        return os.isatty(descriptor)
    except OSError:
        return False


def _say(line: str) -> None:
    # Not through a stream, which the signal may have interrupted in the middle.
    with contextlib.suppress(OSError):
        os.write(2, f"{line}\n".encode())
