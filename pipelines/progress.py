"""Show a run's progress on the driver: a bar in a terminal, plain lines elsewhere.

Workers post to a board; a thread of the driver takes what is there and shows it.
"""

from __future__ import annotations

import contextlib
import queue
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

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


Shown = Event | NamedBadImage


class Board:
    """Hold what is posted until the driver takes it; on Ray it is an actor."""

    def __init__(self) -> None:
        # Training alone, a thread takes while another posts.
        self._items: queue.SimpleQueue[Shown] = queue.SimpleQueue()

    def post(self, item: Shown) -> None:
        """Add something."""
        self._items.put(item)

    def take(self) -> list[Shown]:
        """Hand over all that is there, and forget it."""
        return [self._items.get() for _ in range(self._items.qsize())]


class Display:
    """Show what a run's workers post; see `showing`."""

    def __init__(
        self, *, num_steps: int, num_epochs: int, bad_images: BadImageLog
    ) -> None:
        self._bad_images = bad_images
        self._num_epochs = num_epochs
        self._is_terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=num_steps, unit="step", disable=not self._is_terminal, leave=False
        )

    @contextlib.contextmanager
    def showing(self, take: Callable[[], list[Shown]]) -> Iterator[None]:
        """Show, on a thread, what `take` gives while a `with` block runs."""
        ended = threading.Event()

        def run() -> None:
            while not ended.wait(_POLL_S):
                self._show_all(take())
            self._show_all(take())

        thread = threading.Thread(target=run, name="display", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            self._bad_images.flush()
            self._bar.close()

    def _show_all(self, events: list[Shown]) -> None:
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
