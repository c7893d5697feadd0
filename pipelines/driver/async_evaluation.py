"""Asynchronous evaluation of a run's checkpoints: the driver's part.

Each is evaluated by its own Ray task, one at a time. The metrics are stored beside
the checkpoint, so a restarted driver continues with those that are left.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import ray
from ray.exceptions import RayError

from pipelines.checkpoints.store import CheckpointStore, write_validation
from pipelines.config import Run
from pipelines.driver.cluster import needed
from pipelines.evaluation.figures import pictured
from pipelines.events.bad_images import BadImageTeller, NamedBadImage
from pipelines.events.channel import CheckpointSaved, Event, Message, Metrics, Tick
from pipelines.storage.path import StoragePath
from pipelines.storage.redaction import error_summary
from pipelines.worker.job import Job

if TYPE_CHECKING:
    from pipelines.evaluation.checkpoint import CheckpointEvaluation

logger = logging.getLogger(__name__)
_MAX_WAITING = 2
_EPOCH = "epoch_"


class Validator:
    """Asynchronous evaluator of checkpoints, one at a time.

    Only the listener's thread calls it.

    Args:
        folder: The run's.
        emit: Gets the metrics, figures and lines, as if a worker had posted them.
    """

    def __init__(
        self, job: Job, *, folder: StoragePath, emit: Callable[[Event], None]
    ) -> None:
        self._run, self._folder, self._emit = job.run, folder, emit
        settings = job.run.validation
        _check_room(job.run)
        self._measure = ray.remote(
            num_cpus=settings.num_cpus, num_gpus=settings.num_gpus
        )(measure)
        self._job = ray.put(job)
        self._store = CheckpointStore(
            folder,
            num_to_keep=job.run.num_checkpoints_to_keep,
            metric=job.run.validation.metric,
        )
        self._running: tuple[str, ray.ObjectRef] | None = None
        # Those that an earlier driver did not come to.
        self._waiting = [
            kept.name
            for kept in self._store.kept()
            if not kept.is_measured and self._is_due(kept.name)
        ]

    def handle(self, event: Event) -> None:
        """Take checkpoints as they are saved, and evaluate one after the other."""
        if isinstance(event, CheckpointSaved):
            self._saved(event)
        elif isinstance(event, Tick):
            self._look()

    def _saved(self, item: CheckpointSaved) -> None:
        """Take a checkpoint, if it is to be evaluated."""
        if self._is_due(item.name):
            self._waiting.append(item.name)
        elif item.name.startswith(_EPOCH):
            self._note(item.name, metrics={})  # else it would be kept forever

    def _look(self) -> None:
        """Take what has been measured, and begin with the next."""
        if self._running is not None:
            name, found = self._running
            if not ray.wait([found], timeout=0)[0]:
                return
            self._running = None
            self._take(name, found)
        if self._waiting:
            name = self._waiting.pop(0)
            place = self._folder.within(name)
            self._running = name, self._measure.remote(self._job, place)
        self._skip()

    @property
    def is_busy(self) -> bool:
        """Whether any evaluation is running or waiting."""
        return self._running is not None or bool(self._waiting)

    def cancel(self) -> None:
        """Cancel all evaluations; the next driver resumes them."""
        if self._running is not None:
            ray.cancel(self._running[1])
            self._running = None
        self._waiting.clear()

    def _is_due(self, name: str) -> bool:
        if not name.startswith(_EPOCH):
            return False
        epoch = int(name.partition("_")[2])
        num_epochs = self._run.optim.total_epochs
        return self._run.validation.is_due(epoch, num_epochs=num_epochs)

    def _skip(self) -> None:
        """Skip the oldest checkpoints in a long queue, which would be kept forever."""
        while len(self._waiting) > _MAX_WAITING:
            name = self._waiting.pop(0)
            self._note(name, metrics={})
            self._emit(Message(line=f"{name} is not evaluated: training is ahead"))

    def _take(self, name: str, found: ray.ObjectRef) -> None:
        try:
            measured: tuple[CheckpointEvaluation, list[NamedBadImage]] = ray.get(found)
        except (RayError, ValueError) as error:
            self._note(name, metrics={})
            self._emit(Message(line=f"{name} is not evaluated: {error_summary(error)}"))
            return
        result, bad = measured
        for image in bad:
            self._emit(image)
        self._note(name, metrics=result.metrics)
        step, metrics = result.position.step, result.metrics
        self._emit(Metrics(step=step, metrics=metrics))
        if result.reports:
            self._emit(pictured(result.reports, title=f"{self._run.recipe}, {name}"))
        line = f"{name}  held-out top-1 {metrics['val/top1']:.2f} %"
        self._emit(Message(line=f"{line} of {metrics['val/num_images']:,.0f} images"))

    def _note(self, name: str, *, metrics: dict[str, float]) -> None:
        try:
            write_validation(self._folder.within(name), metrics=metrics)
        except (OSError, ValueError) as error:
            logger.warning("%s: what was measured is not noted: %s", name, error)


def _check_room(run: Run) -> None:
    """Raise ValueError where no task fits beside the workers: Ray would wait."""
    has, taken = ray.cluster_resources(), needed(run.scale)
    wanted = {"CPU": run.validation.num_cpus, "GPU": run.validation.num_gpus}
    for name, num in wanted.items():
        left = has.get(name, 0.0) - taken.get(name, 0.0)
        if left < num:
            raise ValueError(
                f"validation.asynchronous: expected {num:g} {name} beside the "
                f"workers', got {left:g}; lower --scale.num-workers or "
                f"--validation.num-{name.lower()}s, or leave out "
                "--validation.asynchronous"
            )


def measure(
    job: Job, place: StoragePath
) -> tuple[CheckpointEvaluation, list[NamedBadImage]]:
    """Evaluate a checkpoint on a run's held-out sets: the Ray task.

    Also returns the images that can't be decoded.
    """
    import torch

    from pipelines.checkpoints.manifest import opened
    from pipelines.config.recipes import load_code
    from pipelines.evaluation.checkpoint import measure_checkpoint
    from pipelines.hardware.device import device_of

    num_threads = max(int(job.run.validation.num_cpus), 1)
    torch.set_num_threads(num_threads)
    if job.code:
        load_code(job.code)
    bad: list[NamedBadImage] = []
    with opened(place) as folder:
        found = measure_checkpoint(
            Path(folder),
            sets=job.held_out,
            weights=job.run.validation.weights,
            device=device_of(
                job.run.validation.num_gpus > 0, flag="--validation.num-gpus"
            ),
            num_threads=num_threads,
            on_bad=lambda one: BadImageTeller(
                bad.append, split=one.prefix, groups=one.shards.groups
            ),
        )
    return found, bad
