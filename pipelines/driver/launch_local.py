"""Train in the calling process: no Ray, no other process.

Everything but the group is as on Ray's workers: the same model, batches, checkpoints
and metrics. A failure ends the run, which `--resume` continues; nothing restarts it
automatically.
"""

from __future__ import annotations

import gc
import logging
import threading
from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch
from ray.train import UserCallback

from pipelines.config import Data
from pipelines.data.loader import LocalOpener, ShardOpener
from pipelines.data.reading import Reading
from pipelines.driver.failures import Rewinds
from pipelines.errors import RewindError, RunFailedError
from pipelines.events.channel import (
    Channel,
    Event,
    Message,
    Sink,
    consumed,
    wait_until_handled,
)
from pipelines.hardware.device import device_of, numerics_kept
from pipelines.storage.path import StoragePath
from pipelines.storage.redaction import error_summary
from pipelines.worker.job import Job, Trained, outcome
from pipelines.worker.worker import Worker

T = TypeVar("T")
logger = logging.getLogger(__name__)
# In one process that costs nothing, and a report waits for it.
_LISTEN_EVERY_S = 0.02


class LocalGroup:
    """`Group` of the only worker, in this process.

    Args:
        folder: The run's.
        callbacks: Called as by Ray Train, but without a run context.
    """

    rank = 0
    world_size = 1
    # Nobody would start it again.
    is_watched = False

    def __init__(
        self,
        job: Job,
        *,
        folder: StoragePath,
        callbacks: Sequence[UserCallback],
        channel: Channel,
    ) -> None:
        self.device = device_of(job.run.scale.use_gpu, flag="--scale.use-gpu")
        self.folder = folder
        self._callbacks = callbacks
        self._channel = channel

    def opener(self, reading: Reading, *, data: Data) -> ShardOpener:
        """Return an opener that reads in this process, as batches are consumed."""
        return LocalOpener(reading)

    def broadcast(self, value: T) -> T:
        """Return the value unchanged."""
        return value

    def report(self, metrics: Mapping[str, float]) -> None:
        """Call the callbacks, once the driver's thread has handled earlier events."""
        wait_until_handled(self._channel.is_handled, every_s=_LISTEN_EVERY_S)
        for callback in self._callbacks:
            callback.after_report(None, [dict(metrics)], None)  # pyright: ignore[reportArgumentType]

    def post(self, item: Event) -> None:
        """Post to this process's channel."""
        self._channel.post(item)

    def should_stop(self) -> bool:
        """Check this process's channel for a stop request."""
        return self._channel.should_stop()

    def is_preempted(self) -> bool:
        """Return False: preemption ends the process itself, without notice."""
        return False

    def close(self) -> None:
        """Do nothing: nothing was started."""


def train_alone(
    job: Job,
    *,
    name: str,
    callbacks: Sequence[UserCallback],
    sinks: Sequence[Sink],
    should_stop: threading.Event,
) -> Trained:
    """Train to the end of the run in this process, and show its progress.

    Raises ValueError for user errors, and RunFailedError for all else.
    """
    channel = Channel()
    num_threads = torch.get_num_threads()
    logger.info("training in this process")
    folder = StoragePath(job.run.storage).within(name)
    group = LocalGroup(job, folder=folder, callbacks=callbacks, channel=channel)
    rewinds = Rewinds(job.run.optim.max_nonfinite_steps)
    try:
        with (
            numerics_kept(),
            consumed(channel, sinks, should_stop=should_stop, every_s=_LISTEN_EVERY_S),
        ):
            while not _trained_once(job, group=group, rewinds=rewinds):
                # The next worker's state is not to lie beside the last one's, whose
                # callbacks refer to it in circles.
                gc.collect()
    except ValueError:
        raise
    except Exception as error:
        reason = error_summary(error)
        raise RunFailedError(reason) from error
    finally:
        torch.set_num_threads(num_threads)
    return outcome(job.run, folder=folder)


def _trained_once(job: Job, *, group: LocalGroup, rewinds: Rewinds) -> bool:
    """Train to the end, or until a rewind; return whether it reached the end."""
    try:
        with Worker(job, group=group) as worker:
            worker.train()
    except RewindError as error:
        rewinds.count(error)
        group.post(Message(line=f"back to the last checkpoint: {error}"))
        return False
    return True
