"""Run one worker of a training that Ray Train has started."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import ray
import ray.train
import ray.train.torch
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError
from ray.train.collective import broadcast_from_rank_zero

from pipelines.config import Data
from pipelines.data.loader import ShardOpener
from pipelines.data.reading import Reading
from pipelines.events.channel import Event, wait_until_handled
from pipelines.storage.path import StoragePath
from pipelines.worker.group import Small
from pipelines.worker.opener import RayOpener
from pipelines.worker.worker import Worker

# Of a driver that is there, answers come in milliseconds.
_ANSWER_S = 5.0
_POLL_S = 0.1


class RayGroup:
    """`Group` of the workers that Ray Train has started together.

    Args:
        channel: The actor that passes events to the driver.
        folder: The run's.
        is_preemptible: Whether Ray watches for preemption notices.
    """

    is_watched = True

    def __init__(
        self, channel: ActorHandle, *, folder: StoragePath, is_preemptible: bool
    ) -> None:
        context = ray.train.get_context()
        self.rank = context.get_world_rank()
        self.world_size = context.get_world_size()
        self.device = ray.train.torch.get_device()
        self.folder = folder
        self._channel = channel
        self._is_preemptible = is_preemptible
        self._openers: list[RayOpener] = []

    def opener(self, reading: Reading, *, data: Data) -> ShardOpener:
        """Return an opener of Ray datasets."""
        opener = RayOpener(reading, data=data, rank=self.rank)
        self._openers.append(opener)
        return opener

    def broadcast(self, value: Small) -> Small:
        """Broadcast rank 0's value to all workers."""
        return broadcast_from_rank_zero(value)

    def report(self, metrics: Mapping[str, float]) -> None:
        """Report an epoch's metrics to Ray Train: a barrier of all workers.

        Checkpoints are not Ray's: it would restart training where one can't be
        written, and only knows those of its own session. Those within an epoch are
        not reported, since Ray takes one report in two seconds.
        """
        if "epoch" not in metrics:
            return
        if self.rank == 0:
            wait_until_handled(self._is_heard, every_s=_POLL_S)
        ray.train.report(dict(metrics))

    def post(self, item: Event) -> None:
        """Post to the driver's channel."""
        self._channel.post.remote(item)

    def should_stop(self) -> bool:
        """Check the driver's channel for a stop request, on rank 0 alone."""
        if self.rank != 0:
            return False
        return _answer(self._channel.should_stop.remote())

    def is_preempted(self) -> bool:
        """Check with Ray, on all workers, whether it has a preemption notice."""
        return self._is_preemptible and ray.train.get_preemption_info() is not None

    def _is_heard(self) -> bool:
        return _answer(self._channel.is_handled.remote())

    def close(self) -> None:
        """Shut down the openers' threads."""
        for opener in self._openers:
            opener.close()


def _answer(question: ray.ObjectRef) -> bool:
    """Return the channel's answer; False at the timeout."""
    with contextlib.suppress(GetTimeoutError):
        return bool(ray.get(question, timeout=_ANSWER_S))
    return False


def run_worker(config: Mapping[str, Any]) -> None:
    """Train as one worker of a group, with the job that `config` refers to."""
    group = RayGroup(
        config["channel"],
        folder=config["folder"],
        is_preemptible=config["is_preemptible"],
    )
    with Worker(ray.get(config["job"]), group=group) as worker:
        worker.train()
