"""Run the workers' own training loop in this process, on batches that a test made."""

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
from pipelines.data.batch import Batch
from pipelines.data.position import Position
from pipelines.data.reading import Reading
from pipelines.data.stream import LocalOpener, ShardOpener
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
    """A worker's `Group` whose driver is the test: what is posted stays here."""

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
        """Give the value back: tests with several workers broadcast nothing."""
        return value

    def report(self, metrics: Mapping[str, float]) -> None:
        """Keep what was reported."""
        self.reports.append(metrics)

    def post(self, item: Event) -> None:
        """Keep what was posted."""
        self.events.append(item)

    def should_stop(self) -> bool:
        """Tell what the test has set."""
        return self.is_stopping

    def is_preempted(self) -> bool:
        """Tell what the test has set."""
        return self.is_taken

    def close(self) -> None:
        """End nothing: nothing was started."""


class NotingCheckpointer(Checkpointer):
    """Write each checkpoint once the one before is written, and note its place."""

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
        """Note it first: so it is there where writing raises."""
        self.saved.append((name, state.position))
        super().keep(state, name=name, metrics=metrics, can_wait=True)


@dataclass(kw_only=True)
class NotingLoop(TrainingLoop):
    """The workers' loop, which notes what every worker logs: the first one posts it."""

    events: list[Event]
    """What it posted, and its checkpointer."""
    saved: list[tuple[str, Position]]
    """Its checkpoints by name, and where each stands."""
    logs: list[dict[str, float]] = field(default_factory=list)

    def _log(self, metrics: Mapping[str, float], *, batch: Batch) -> None:
        step = {"step": self.state.position.step, "epoch": batch.epoch}
        self.logs.append({**metrics, **step})
        super()._log(metrics, batch=batch)

    def kept(self, kind: str) -> list[Position]:
        """Where checkpoints were written: those of an `epoch`, or of a `step`."""
        return [
            position for name, position in self.saved if name.startswith(f"{kind}_")
        ]

    @property
    def messages(self) -> list[str]:
        """Lines that a person would see."""
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
    """Make a loop that evaluates on no set, and end its writer afterwards.

    Args:
        folder: Where its checkpoints stay; else they are deleted at the end.
        is_stopping: Whether the driver wants it to end.
        is_preempted: Whether the machine is about to be taken.
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
            evaluator=InTrainingEvaluator(
                (), run=run, device=settings.device, batches=lambda one: ()
            ),
            watchdog=Watchdog(0, tell=lambda line: None),
            events=group.events,
            saved=checkpointer.saved,
            **parts,
        )
