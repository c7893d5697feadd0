"""Train on a Ray's workers: the driver's part."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, cast

import ray
import ray.train
import ray.train.torch
from ray.actor import ActorClass, ActorHandle
from ray.exceptions import RayError
from ray.train import UserCallback
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipelines.config import Scale
from pipelines.driver.async_evaluation import Validator
from pipelines.driver.cluster import has_dashboard, per_worker
from pipelines.driver.failures import StopOnValueError
from pipelines.driver.run_channel import RunChannel
from pipelines.errors import RunFailedError
from pipelines.events.channel import Event, Sink, consumed, wait_until_handled
from pipelines.storage.filesystem import open_filesystem
from pipelines.storage.path import StoragePath
from pipelines.storage.redaction import error_summary
from pipelines.storage.retry import is_remote
from pipelines.worker.entry import work
from pipelines.worker.job import Job, Trained, outcome

logger = logging.getLogger(__name__)
_LISTEN_EVERY_S = 0.5
_LEAST_HEALTH_CHECK_S = 60.0
_FIT = "fit"
# The discard service's port, which no Ray takes.
_NO_DASHBOARD = "http://127.0.0.1:9"
# What Ray Train takes from the environment of who starts it.
_PASSED_ON = ("RAY_TRAIN_", "NCCL_RAS_", "TORCHFT_")


def train_on_ray(
    job: Job,
    *,
    name: str,
    callbacks: Sequence[UserCallback],
    sinks: Sequence[Sink],
    should_stop: threading.Event,
) -> Trained:
    """Start the workers, show their progress, and wait for their end.

    Raises ValueError where a worker raised it, and RunFailedError where workers failed
    more often than the run allows.
    """
    run = job.run
    logger.info("starting %s workers", _num_text(run.scale))
    channel, folder = _start_channel(run.scale), StoragePath(run.storage).within(name)
    filesystem, path = open_filesystem(run.storage)
    trainer = ray.train.torch.TorchTrainer(
        work,
        train_loop_config={
            "job": ray.put(job),
            "channel": channel,
            "folder": folder,
            "is_preemptible": _is_preemptible(),
        },
        scaling_config=ray.train.ScalingConfig(
            num_workers=_num_workers(run.scale),
            elastic_resize_monitor_interval_s=run.scale.resize_every_s,
            use_gpu=run.scale.use_gpu,
            resources_per_worker=per_worker(run.scale),
        ),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=path,
            storage_filesystem=filesystem if is_remote(run.storage) else None,
            failure_config=ray.train.FailureConfig(max_failures=run.scale.max_failures),
            callbacks=[
                StopOnValueError(
                    channel.post.remote, max_rewinds=run.optim.max_nonfinite_steps
                ),
                *callbacks,
            ],
        ),
    )
    with _listening(
        job, folder=folder, channel=channel, sinks=sinks, should_stop=should_stop
    ):
        ended = channel.fit.options(concurrency_group=_FIT).remote(trainer)
        # In short waits: within one Ray would answer signals first.
        while not ray.wait([ended], timeout=_LISTEN_EVERY_S)[0]:
            pass
        try:
            error = cast(Exception | None, ray.get(ended))
        except RayError as lost:  # its process is gone, or what it said can't be read
            raise RunFailedError(error_summary(lost)) from lost
    if error is not None:
        raise error
    return outcome(run, folder=folder)


@contextlib.contextmanager
def _listening(
    job: Job,
    *,
    folder: StoragePath,
    channel: ActorHandle,
    sinks: Sequence[Sink],
    should_stop: threading.Event,
) -> Iterator[None]:
    """Consume the workers' events; if wanted, evaluate asynchronously to the end."""
    here, every_s = _ActorChannel(channel), _LISTEN_EVERY_S
    if not job.run.validation.asynchronous:
        with consumed(here, sinks, should_stop=should_stop, every_s=every_s):
            yield
        return

    def emit(event: Event) -> None:
        for sink in sinks:
            sink.handle(event)

    validator = Validator(job, folder=folder, emit=emit)
    all_sinks = [*sinks, validator]
    with consumed(here, all_sinks, should_stop=should_stop, every_s=every_s):
        try:
            yield
            wait_until_handled(here.is_handled, every_s=every_s)
            if validator.is_busy:
                logger.info("evaluating the last checkpoints")
            while validator.is_busy:
                time.sleep(every_s)
        finally:
            validator.cancel()


def train_environment(scale: Scale) -> dict[str, str]:
    """Build the environment of Ray Train's actor, which its workers inherit.

    Ray Train asks its Ray's dashboard whether the run is alive, and removes the
    workers' places where it is not. It looks for its own Ray by RAY_ADDRESS; of one
    without a dashboard it asks whatever answers at the usual port, such as another
    Ray's, which knows nothing of the run. So then it is sent where nothing answers.
    """
    settings = {
        name: value for name, value in os.environ.items() if name.startswith(_PASSED_ON)
    }
    settings["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
    if not has_dashboard():
        settings["RAY_API_SERVER_ADDRESS"] = _NO_DASHBOARD
    if scale.hang_timeout_s:
        # A process that answers nothing at all, its watchdog included. Later than the
        # watchdogs, which say where their threads stand.
        seconds = max(2 * scale.hang_timeout_s, _LEAST_HEALTH_CHECK_S)
        settings["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = str(seconds)
    if not _is_preemptible():
        settings["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"
    return settings


def _is_preemptible() -> bool:
    """Assume preemption notices on clusters only; the watcher is a further process."""
    return bool(os.environ.get("RAY_ADDRESS"))


def _num_workers(scale: Scale) -> int | tuple[int, int]:
    """Return Ray Train's number of workers: a range where it may vary."""
    if not scale.min_workers:
        return scale.num_workers
    return scale.min_workers, scale.num_workers


def _num_text(scale: Scale) -> str:
    least = f"{scale.min_workers} to " if scale.min_workers else ""
    return f"{least}{scale.num_workers}"


def _start_channel(scale: Scale) -> ActorHandle:
    """Start the channel on the driver's node; it reserves no CPU."""
    here = NodeAffinitySchedulingStrategy(
        ray.get_runtime_context().get_node_id(), soft=False
    )
    # Ray's annotations know no concurrency groups.
    remote = cast(Any, ray.remote)(num_cpus=0, concurrency_groups={_FIT: 1})
    actor = cast(ActorClass, remote(RunChannel)).options(
        scheduling_strategy=here, runtime_env={"env_vars": train_environment(scale)}
    )
    return cast(ActorHandle, actor.remote())


class _ActorChannel:
    """Driver's end of a channel that is an actor."""

    def __init__(self, actor: ActorHandle) -> None:
        self._actor = actor

    def take(self) -> list[Event]:
        try:
            return ray.get(self._actor.take.remote())
        except RayError:
            return []  # Ray is going down; the result will say how it ended.

    def is_handled(self) -> bool:
        return bool(ray.get(self._actor.is_handled.remote()))

    def end(self) -> None:
        self._actor.end.remote()
