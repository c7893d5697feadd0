"""Answer Ctrl-C, SIGTERM and SIGHUP with an orderly end.

The words of a person, of schedulers and spot markets, and of a terminal that is closed:
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


class StopRequest:
    """What signals ask of this process, and how it answers them now."""

    def __init__(self) -> None:
        self.event = threading.Event()
        """Set once the process is asked to end."""
        self.begun = threading.Event()
        """To be set once there is something to keep."""
        self._number = signal.SIGTERM
        self._asked_s = -math.inf
        self._answer: Answer = "end"
        self._answered: tuple[int, ...] = ()
        self._came: int | None = None  # a pipe's end, from which signals are read
        self._terminals = [fd for fd in (0, 1, 2) if _is_terminal(fd)]

    def arm(self) -> None:
        """Answer signals again after a library took them: `ray.init` takes SIGTERM.

        Those that `stop_requests` leaves alone stay so. Raises as `check` does.
        """
        for number in self._answered:
            signal.signal(number, self.handle)
        self.check()

    @contextlib.contextmanager
    def answering(self, numbers: Iterable[int]) -> Iterator[None]:
        """Answer these signals within a block; note those that a library answers.

        Its handler may raise what is lost: within a finalizer Python ignores it.
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
        """Within this block, once it has begun, a signal only sets the event.

        The second one ends it at once.
        """
        with self._answering("note"):
            yield self.event

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Let signals wait until the block is done; see `check`."""
        with self._answering("wait"):
            yield

    def finish(self) -> None:
        """Let signals wait for ever: all is done but for leaving."""
        self._answer = "wait"

    def check(self) -> None:
        """Raise as the signal would have where one has come in the meantime."""
        self._note_what_came()
        if self.event.is_set():
            raise self._interruption()

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """Raise a signal's own end where Ray made another SystemExit of it.

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
        """Name of the signal that came last."""
        return signal.Signals(self._number).name

    @contextlib.contextmanager
    def _answering(self, answer: Answer) -> Iterator[None]:
        before, self._answer = self._answer, answer
        try:
            yield
        finally:
            self._answer = before

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Answer a signal: the handler, in the main thread."""
        if number == signal.SIGHUP:
            self._leave_terminals()
        now_s = time.monotonic()
        if now_s - self._asked_s < ECHO_S and number == self._number:
            return
        is_again = self.event.is_set()
        self._number, self._asked_s = signal.Signals(number), now_s
        self.event.set()
        is_end = is_again or not self.begun.is_set()
        if self._answer == "end" or (self._answer == "note" and is_end):
            raise self._interruption()
        if self._answer == "note":
            _say(f"{self.name}: writing a checkpoint, then ending; again: at once")

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
        """Write to nowhere what goes to a terminal: it is gone, and writing fails."""
        nowhere = os.open(os.devnull, os.O_RDWR)
        for terminal in self._terminals:
            os.dup2(nowhere, terminal)
        os.close(nowhere)


@contextlib.contextmanager
def stop_requests(*, is_wanted: bool = True) -> Iterator[StopRequest]:
    """Answer signals while a block runs.

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
