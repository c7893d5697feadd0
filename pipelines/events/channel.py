"""Message channel from workers to the driver, and the driver's stop signal.

Workers post events; a thread of the driver takes what is there. So only the driver
shows, and only the driver writes to MLflow: workers need no way to it.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from pipelines.events.bad_images import NamedBadImage

_PATIENCE_S = 5.0


@dataclass(frozen=True, kw_only=True)
class WorkerStarted:
    """Say that a worker has begun, again after a restart."""

    rank: int
    world_size: int
    host: str
    step: int
    hardware: Mapping[str, str] = field(default_factory=dict)
    """What `pipelines.hardware.facts` knows of it."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Report a step, or the end of an epoch where `epoch_metrics` is given."""

    step: int
    epoch: int
    metrics: Mapping[str, float]
    epoch_metrics: Mapping[str, float] | None = None


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """Give values by the names that MLflow keeps them under."""

    step: int
    metrics: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Figure:
    """Give what draws a picture into a file, and the path that MLflow keeps it at."""

    draw: Callable[[Path], None]
    path: str


@dataclass(frozen=True, kw_only=True)
class WorkerFailed:
    """Say that a worker has failed, and why."""

    rank: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class CheckpointSaved:
    """Say that a checkpoint is written."""

    name: str
    epoch: int
    step: int


@dataclass(frozen=True, kw_only=True)
class CheckpointFailed:
    """Say that a checkpoint could not be written, and why."""

    name: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Message:
    """Say something that a person should see, in one line."""

    line: str


Event = (
    WorkerStarted
    | Progress
    | Metrics
    | Figure
    | WorkerFailed
    | CheckpointSaved
    | CheckpointFailed
    | Message
    | NamedBadImage
)


class Channel:
    """Hold what is posted until the driver takes it; on Ray it is an actor."""

    def __init__(self) -> None:
        # Training alone, a thread takes while another posts.
        self._items: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._is_being_heard = False
        self._is_ending = False

    def post(self, item: Event) -> None:
        """Add something."""
        self._items.put(item)

    def take(self) -> list[Event]:
        """Hand over all that is there, and forget it."""
        items = [self._items.get() for _ in range(self._items.qsize())]
        # Who takes again has done with what it took before.
        self._is_being_heard = bool(items)
        return items

    def is_handled(self) -> bool:
        """Tell whether the driver has done with all that was posted."""
        return self._items.empty() and not self._is_being_heard

    def end(self) -> None:
        """Ask the workers to write a checkpoint and end."""
        self._is_ending = True

    def should_stop(self) -> bool:
        """Tell whether the workers are to end."""
        return self._is_ending


def wait_until_handled(is_handled: Callable[[], bool], *, every_s: float) -> None:
    """Wait until the driver has done with all, but not for one that does not listen.

    With a report a sweep may end the run: what was measured is to be kept first.
    """
    deadline_s = time.monotonic() + _PATIENCE_S
    while not is_handled() and time.monotonic() < deadline_s:
        time.sleep(every_s)


class DriversChannel(Protocol):
    """The driver's end of a channel, wherever the channel is."""

    def take(self) -> Sequence[Event]:
        """Take what is there."""
        ...

    def end(self) -> None:
        """Ask the workers to write a checkpoint and end."""
        ...


@contextlib.contextmanager
def consumed(
    channel: DriversChannel,
    *,
    handle: Callable[[Event], None],
    is_over: threading.Event,
    every_s: float,
    on_look: Callable[[], None] = lambda: None,
) -> Iterator[None]:
    """Hear, on a thread, what is posted while a `with` block runs.

    Args:
        is_over: Once it is set, the workers are asked to end.
        every_s: How often the thread looks.
        on_look: Is called then.
    """
    has_ended = threading.Event()

    def run() -> None:
        is_asked = False
        while not has_ended.wait(every_s):
            if is_over.is_set() and not is_asked:
                channel.end()
                is_asked = True
            _handle_all(channel.take(), handle=handle)
            on_look()
        _handle_all(channel.take(), handle=handle)

    thread = threading.Thread(target=run, name="channel", daemon=True)
    thread.start()
    try:
        yield
    finally:
        has_ended.set()
        thread.join()


def _handle_all(items: Sequence[Event], *, handle: Callable[[Event], None]) -> None:
    for item in items:
        handle(item)
