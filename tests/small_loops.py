"""Run the workers' training loop in this process, on a test's batches."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch

from pipelines.config import Data, Validation
from pipelines.data.batch import Batch, Position
from pipelines.data.loader import LocalOpener, ShardOpener
from pipelines.data.reading import Reading
from pipelines.evaluation.in_training import InTrainingEvaluator
from pipelines.events.channel import Event, Message
from pipelines.storage.path import StoragePath
from pipelines.training.state import TrainState
from pipelines.training.step import TrainSettings
from pipelines.worker.checkpointing import Checkpointer
from pipelines.worker.group import Small
from pipelines.worker.job import Job
from pipelines.worker.loop import TrainingLoop
from pipelines.worker.watchdog import Watchdog


class MemoryGroup:
    """A worker's `Group` that keeps what is posted, without a driver."""

    is_watched = False

    def __init__(
        self,
        folder: StoragePath,
        *,
        device: torch.device,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.folder, self.device = folder, device
        self.rank, self.world_size = rank, world_size
        self.events: list[Event] = []
        self.reports: list[Mapping[str, float]] = []
        self.is_stopping = self.is_taken = False

    def opener(self, reading: Reading, *, data: Data) -> ShardOpener:
        """Read in this process."""
        return LocalOpener(reading)

    def broadcast(self, value: Small) -> Small:
        """Return the value: tests with several workers broadcast nothing."""
        return value

    def report(self, metrics: Mapping[str, float]) -> None:
        """Keep what was reported."""
        self.reports.append(metrics)

    def post(self, item: Event) -> None:
        """Keep what was posted."""
        self.events.append(item)

    def should_stop(self) -> bool:
        """Return whether the test has requested a stop."""
        return self.is_stopping

    def is_preempted(self) -> bool:
        """Return whether the test has announced a preemption."""
        return self.is_taken

    def close(self) -> None:
        """Do nothing: nothing was started."""


class NotingCheckpointer(Checkpointer):
    """Checkpointer that waits for the one before, and records each position."""

    def __init__(self, job: Job, *, group: MemoryGroup) -> None:
        super().__init__(job, group=group)
        self.saved: list[tuple[str, Position]] = []

    def keep(
        self,
        state: TrainState,
        *,
        name: str,
        metrics: Mapping[str, float],
        can_wait: bool,
    ) -> None:
        """Record the position before writing, which may raise."""
        self.saved.append((name, state.position))
        super().keep(state, name=name, metrics=metrics, can_wait=True)


@dataclass(kw_only=True)
class NotingLoop(TrainingLoop):
    """The workers' loop, recording what every worker logs, not only the first."""

    events: list[Event]
    """What the loop and its checkpointer posted."""
    saved: list[tuple[str, Position]]
    """Its checkpoints by name, with their positions."""
    logs: list[dict[str, float]] = field(default_factory=list)

    def _log(self, metrics: Mapping[str, float], *, batch: Batch) -> None:
        step = {"step": self.state.position.step, "epoch": batch.epoch}
        self.logs.append({**metrics, **step})
        super()._log(metrics, batch=batch)

    def kept(self, kind: str) -> list[Position]:
        """Return the positions of checkpoints: those of an `epoch`, or of a `step`."""
        return [
            position for name, position in self.saved if name.startswith(f"{kind}_")
        ]

    @property
    def messages(self) -> list[str]:
        """Lines that a user would see."""
        return [item.line for item in self.events if isinstance(item, Message)]


@contextlib.contextmanager
def small_loop(
    state: TrainState,
    batches: Iterable[Batch],
    *,
    settings: TrainSettings,
    folder: str = "",
    classes: tuple[str, ...] = ("a", "b", "c"),
    is_stopping: bool = False,
    is_preempted: bool = False,
    **parts: Any,
) -> Iterator[NotingLoop]:
    """Build a loop without evaluation, and close its writer afterwards.

    Args:
        folder: Where its checkpoints stay; if empty, they are deleted at the end.
        is_stopping: Whether the driver requests a stop.
        is_preempted: Whether the machine is about to be preempted.
    """
    run = dataclasses.replace(settings.run, validation=Validation(held_out=False))
    settings = dataclasses.replace(settings, run=run)
    shards: Any = SimpleNamespace(classes=classes)
    job = Job(
        run=run,
        train_shards=shards,
        val_shards=None,
        held_out=(),
        tracking_uri="",
        mlflow_run_id="",
    )
    with contextlib.ExitStack() as stack:
        folder = folder or stack.enter_context(tempfile.TemporaryDirectory())
        group = MemoryGroup(
            StoragePath(folder),
            device=settings.device,
            rank=settings.rank,
            world_size=settings.world_size,
        )
        group.is_stopping, group.is_taken = is_stopping, is_preempted
        checkpointer = NotingCheckpointer(job, group=group)
        stack.callback(checkpointer.close, is_done=False)
        yield NotingLoop(
            state=state,
            settings=settings,
            batches=batches,
            group=group,
            checkpointer=checkpointer,
            early_stopping=checkpointer.early_stopping(),
            evaluator=InTrainingEvaluator(
                (), run=run, device=settings.device, batches=lambda one: ()
            ),
            watchdog=Watchdog(0, tell=lambda line: None),
            events=group.events,
            saved=checkpointer.saved,
            **parts,
        )
