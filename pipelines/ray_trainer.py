"""Train on the workers of a Ray: the driver's part."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import ray
import ray.train
import ray.train.torch
from ray.actor import ActorHandle
from ray.exceptions import RayError
from ray.train import UserCallback

from pipelines.entry import work
from pipelines.failures import StopOnValueError, end_of
from pipelines.files import Place
from pipelines.job import Job, Trained
from pipelines.places import open_place
from pipelines.progress import Board, Display, Shown
from pipelines.retries import is_remote
from pipelines.session import per_worker

logger = logging.getLogger(__name__)


def train_on_ray(
    job: Job, *, name: str, callbacks: Sequence[UserCallback], display: Display
) -> Trained:
    """Start the workers, show what they report, and wait for their end.

    Raises ValueError where a worker raised it, and RunFailedError where workers failed
    more often than the run allows.
    """
    run = job.run
    logger.info("starting %d workers", run.scale.num_workers)
    # It needs no CPU of its own.
    board = cast(ActorHandle, ray.remote(num_cpus=0)(Board).remote())
    filesystem, path = open_place(run.storage)
    trainer = ray.train.torch.TorchTrainer(
        work,
        train_loop_config={"job": ray.put(job), "board": board},
        scaling_config=ray.train.ScalingConfig(
            num_workers=run.scale.num_workers,
            use_gpu=run.scale.use_gpu,
            resources_per_worker=per_worker(run.scale),
        ),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=path,
            storage_filesystem=filesystem if is_remote(run.storage) else None,
            failure_config=ray.train.FailureConfig(max_failures=run.scale.max_failures),
            checkpoint_config=ray.train.CheckpointConfig(
                num_to_keep=run.num_checkpoints_to_keep
            ),
            callbacks=[StopOnValueError(), *callbacks],
        ),
    )
    try:
        with display.showing(lambda: _taken(board)):
            result = trainer.fit()
    except ray.train.TrainingFailedError as error:
        raise end_of(error) from error
    kept = None
    if result.checkpoint is not None:
        # Of a bucket, Ray gives the path alone.
        kept = Place(run.storage, f"{name}/{Path(result.checkpoint.path).name}")
    return Trained(metrics=result.metrics or {}, checkpoint=kept)


def _taken(board: ActorHandle) -> list[Shown]:
    try:
        return ray.get(board.take.remote())
    except RayError:
        return []  # Ray is going down; the result will say how it ended.
