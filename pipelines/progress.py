"""Show a run's progress on the driver: a bar in a terminal, plain lines elsewhere.

Rank 0 posts events to a small actor; a thread of the driver takes and shows them.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import cast

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError
from tqdm import tqdm

from pipelines.bad_images import BadImageLog, NamedBadImage

_POLL_S = 0.5


@dataclass(frozen=True, kw_only=True)
class Event:
    """Report a step, or the end of an epoch where `epoch_metrics` is given."""

    step: int
    epoch: int
    metrics: Mapping[str, float]
    epoch_metrics: Mapping[str, float] | None = None


class Board:
    """Hold events until the driver takes them; made an actor by `start_board`."""

    def __init__(self) -> None:
        self._events: list[Event | NamedBadImage] = []

    def post(self, event: Event | NamedBadImage) -> None:
        """Add an event."""
        self._events.append(event)

    def take(self) -> list[Event | NamedBadImage]:
        """Hand over all events and forget them."""
        events, self._events = self._events, []
        return events


def start_board() -> ActorHandle:
    """Start the actor that the workers post to; it needs no CPU of its own."""
    return cast(ActorHandle, ray.remote(num_cpus=0)(Board).remote())


class Display:
    """Show a board's events while a `with` block runs."""

    def __init__(
        self,
        board: ActorHandle,
        *,
        num_steps: int,
        num_epochs: int,
        bad_images: BadImageLog,
    ) -> None:
        self._board = board
        self._bad_images = bad_images
        self._num_epochs = num_epochs
        self._is_terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=num_steps, unit="step", disable=not self._is_terminal, leave=False
        )
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="display", daemon=True)

    def __enter__(self) -> Display:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self._bad_images.flush()
        self._bar.close()

    def _run(self) -> None:
        while not self._ended.wait(_POLL_S):
            self._show_new()
        self._show_new()

    def _show_new(self) -> None:
        try:
            events = ray.get(self._board.take.remote())
        except RayError:
            return  # Ray is going down; the result will say how it ended.
        for event in events:
            if isinstance(event, NamedBadImage):
                if line := self._bad_images.add(event):
                    self._say(line)
            else:
                self._show(event)

    def _show(self, event: Event) -> None:
        if event.epoch_metrics is not None:
            self._say(epoch_line(event, num_epochs=self._num_epochs))
            self._bad_images.flush()
        elif self._is_terminal:
            # After a restart the bar goes back to where training goes on from.
            self._bar.n = event.step
            self._bar.set_postfix_str(step_text(event.metrics))
        else:
            self._say(
                f"step {event.step}/{self._bar.total}  {step_text(event.metrics)}"
            )

    def _say(self, line: str) -> None:
        write: Callable[[str], object] = self._bar.write if self._is_terminal else print
        write(line)
        sys.stdout.flush()


def step_text(metrics: Mapping[str, float]) -> str:
    """Put the numbers of some steps into one line."""
    return (
        f"loss {metrics['loss']:.3f}  top-1 {metrics['top1']:.1f} %  "
        f"lr {metrics['lr']:.2e}  {metrics['images_per_s']:,.0f} images/s  "
        f"waiting {100 * metrics['waiting_share']:.0f} %"
    )


def epoch_line(event: Event, *, num_epochs: int) -> str:
    """Put an epoch's training loss and held-out accuracy into one line."""
    held_out = event.epoch_metrics or {}
    return (
        f"epoch {event.epoch}/{num_epochs}  step {event.step}  "
        f"train loss {event.metrics['loss']:.3f}  held-out top-1 "
        f"{held_out['top1']:.2f} % of {held_out['num_images']:,.0f} images  "
        f"{event.metrics['images_per_s']:,.0f} images/s"
    )
