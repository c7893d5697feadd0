"""Show a run's progress on the driver: a bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from tqdm import tqdm

from pipelines.events.bad_images import BadImageLog, NamedBadImage
from pipelines.events.channel import (
    CheckpointFailed,
    Event,
    Message,
    Progress,
    WorkerFailed,
    WorkerStarted,
)
from pipelines.hardware.facts import GPU, gpu_summary


class Display:
    """Progress of a run in the terminal, a sink of its events.

    Args:
        on_begun: Called when all workers have started, with them by rank; returns a
            further line to show.
    """

    def __init__(
        self,
        *,
        num_steps: int,
        num_epochs: int,
        bad_images: BadImageLog,
        on_begun: Callable[[Sequence[WorkerStarted]], str] = lambda begun: "",
    ) -> None:
        self._bad_images, self._on_begun = bad_images, on_begun
        self._num_epochs = num_epochs
        self._begun: dict[int, WorkerStarted] = {}
        self._is_terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=num_steps, unit="step", disable=not self._is_terminal, leave=False
        )

    def handle(self, event: Event) -> None:
        """Show what a person should see of it."""
        if isinstance(event, NamedBadImage):
            if line := self._bad_images.add(event):
                self._say(line)
        elif isinstance(event, Progress):
            self._show_event(event)
        elif isinstance(event, WorkerStarted):
            self._show_begin(event)
        elif isinstance(event, WorkerFailed):
            self._say(f"worker {event.rank} failed: {event.reason}")
        elif isinstance(event, CheckpointFailed):
            self._say(
                f"no checkpoint {event.name}, the one before stays: {event.reason}"
            )
        elif isinstance(event, Message):
            self._say(event.line)

    def close(self) -> None:
        """Flush the list of bad images, and close the bar."""
        self._bad_images.flush()
        self._bar.close()

    def _show_begin(self, item: WorkerStarted) -> None:
        """Show the workers' hosts once all workers have started."""
        if item.rank in self._begun:
            self._begun.clear()
        self._begun[item.rank] = item
        if len(self._begun) == item.world_size:
            begun = [self._begun[rank] for rank in sorted(self._begun)]
            self._say(begin_line(begun))
            self._begun.clear()
            if line := self._on_begun(begun):
                self._say(line)

    def _show_event(self, event: Progress) -> None:
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


def begin_line(begun: list[WorkerStarted]) -> str:
    """Format the number of workers, their hosts and the first step."""
    on = Counter(item.host for item in begun)
    hosts = ", ".join(f"{host}: {num}" for host, num in sorted(on.items()))
    workers = "1 worker" if len(begun) == 1 else f"{len(begun)} workers"
    gpus = gpu_summary(item.hardware[GPU] for item in begun if GPU in item.hardware)
    on_gpus = f", {gpus}" if gpus else ""
    return f"{workers} on {hosts}{on_gpus}; from step {begun[0].step}"


def step_text(metrics: Mapping[str, float]) -> str:
    """Format the metrics of some steps as one line."""
    return (
        f"loss {metrics['loss']:.3f}  top-1 {metrics['top1']:.1f} %  "
        f"lr {metrics['lr']:.2e}  {metrics['images_per_s']:,.0f} images/s  "
        f"waiting {100 * metrics['waiting_share']:.0f} %"
    )


def epoch_line(event: Progress, *, num_epochs: int) -> str:
    """Format an epoch's training loss and held-out accuracy as one line."""
    found = ""
    if held_out := event.epoch_metrics:
        top1, num_images = held_out["top1"], held_out["num_images"]
        found = f"held-out top-1 {top1:.2f} % of {num_images:,.0f} images  "
    return (
        f"epoch {event.epoch}/{num_epochs}  step {event.step}  "
        f"train loss {event.metrics['loss']:.3f}  {found}"
        f"{event.metrics['images_per_s']:,.0f} images/s"
    )
