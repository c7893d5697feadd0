"""Message channel from workers to the driver, and the driver's stop signal.

Workers post events; a thread of the driver polls them. So only the driver displays, and
only the driver writes to MLflow: workers need no access to it.
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
    """Start, or restart, of a worker."""

    rank: int
    world_size: int
    host: str
    step: int
    hardware: Mapping[str, str] = field(default_factory=dict)
    """Facts from `pipelines.hardware.facts`."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Metrics of a step, or of an epoch's end where `epoch_metrics` is set."""

    step: int
    epoch: int
    metrics: Mapping[str, float]
    epoch_metrics: Mapping[str, float] | None = None


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """Metrics of a step by their names in MLflow."""

    step: int
    metrics: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Figure:
    """Picture for MLflow: a function that draws it into a file, and its path there."""

    draw: Callable[[Path], None]
    path: str


@dataclass(frozen=True, kw_only=True)
class WorkerFailed:
    """Failure of a worker, and its reason."""

    rank: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class CheckpointSaved:
    """Checkpoint that was written."""

    name: str
    epoch: int
    step: int


@dataclass(frozen=True, kw_only=True)
class CheckpointFailed:
    """Checkpoint that could not be written, and the reason."""

    name: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Message:
    """One line for the user."""

    line: str


@dataclass(frozen=True, kw_only=True)
class Tick:
    """Sent to sinks each time that the driver has looked; workers post none."""


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
    | Tick
)


class Sink(Protocol):
    """One of those that the driver hands each event to, on its consumer thread."""

    def handle(self, event: Event) -> None:
        """Take what concerns this sink and ignore the rest."""
        ...


class Channel:
    """Queue of events from workers to the driver; on Ray it is an actor."""

    def __init__(self) -> None:
        # Training alone, a thread takes while another posts.
        self._items: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._is_being_heard = False
        self._is_ending = False

    def post(self, item: Event) -> None:
        """Add an event."""
        self._items.put(item)

    def take(self) -> list[Event]:
        """Remove and return all events."""
        items = [self._items.get() for _ in range(self._items.qsize())]
        # Who takes again has done with what it took before.
        self._is_being_heard = bool(items)
        return items

    def is_handled(self) -> bool:
        """Check whether the driver has handled all events."""
        return self._items.empty() and not self._is_being_heard

    def end(self) -> None:
        """Ask the workers to write a checkpoint and stop."""
        self._is_ending = True

    def should_stop(self) -> bool:
        """Check whether the workers are asked to stop."""
        return self._is_ending


def wait_until_handled(is_handled: Callable[[], bool], *, every_s: float) -> None:
    """Wait until the driver has handled all events, with a timeout.

    A sweep may end the run on a report: its metrics are to be stored first.
    """
    deadline_s = time.monotonic() + _PATIENCE_S
    while not is_handled() and time.monotonic() < deadline_s:
        time.sleep(every_s)


class DriversChannel(Protocol):
    """Driver's end of a channel, wherever the channel is."""

    def take(self) -> Sequence[Event]:
        """Remove and return all events."""
        ...

    def end(self) -> None:
        """Ask the workers to write a checkpoint and stop."""
        ...


@contextlib.contextmanager
def consumed(
    channel: DriversChannel,
    sinks: Sequence[Sink],
    *,
    should_stop: threading.Event,
    every_s: float,
) -> Iterator[None]:
    """Hand what is posted to each sink, on one thread, while a `with` block runs.

    Args:
        should_stop: Once it is set, the workers are asked to stop.
        every_s: How often the thread looks.
    """
    has_ended = threading.Event()

    def run() -> None:
        is_asked = False
        while not has_ended.wait(every_s):
            if should_stop.is_set() and not is_asked:
                channel.end()
                is_asked = True
            deliver([*channel.take(), Tick()])
        # No tick: nobody is to begin anything now.
        deliver(channel.take())

    def deliver(events: Sequence[Event]) -> None:
        for event in events:
            for sink in sinks:
                sink.handle(event)

    thread = threading.Thread(target=run, name="events", daemon=True)
    thread.start()
    try:
        yield
    finally:
        has_ended.set()
        thread.join()
