"""Run the Ray Data job that writes a token set's files."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Mapping, Sequence

import ray
from ray.data import ActorPoolStrategy, ReadTask, read_datasource

from pipelines.config import CPUS_PER_READ
from pipelines.data.reading import Reading
from pipelines.driver.cluster import per_worker, ray_session
from pipelines.driver.failures import causes, first_line
from pipelines.worker.ray_source import TaskSource, read_task, reader_labels
from tuning.heads.backbone import Backbone
from tuning.heads.feature_writer import NUM_IMAGES, TokenJob, WriterActor
from tuning.heads.parts import Part, read_part


def write_parts(
    parts: Sequence[Part],
    *,
    jobs: Mapping[str, TokenJob],
    readings: Mapping[str, Reading],
    backbone: Backbone,
) -> Iterator[int]:
    """Write parts on the run's workers; yield each one's number of images when done.

    Args:
        jobs: What is written, by split.
        readings: How each split is read.

    Raises ValueError, in one line, where a shard or the tokens can't be used.
    """
    run = next(iter(jobs.values())).run
    scale = run.scale
    with ray_session(scale):
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        units = read_datasource(
            TaskSource([_task(part, reading=readings[part.split]) for part in parts]),
            num_cpus=CPUS_PER_READ,
            concurrency=run.data.num_readers,
            override_num_blocks=len(parts),
            label_selector=reader_labels(run.data),
        )
        done = units.map_batches(
            WriterActor,
            # A block is one row that holds a whole unit.
            batch_size=None,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(size=min(scale.world_size, len(parts))),
            num_cpus=per_worker(scale)["CPU"],
            num_gpus=per_worker(scale).get("GPU"),
            fn_constructor_args=(jobs,),
            # Once in the store, not with every actor.
            fn_constructor_kwargs={"backbone": ray.put(backbone)},
        )
        done.context.enable_progress_bars = False
        try:
            for row in done.iter_rows():
                yield row[NUM_IMAGES]
        except Exception as error:
            # Ray wraps what a task raised, among pages of its own.
            for cause in causes(error):
                if isinstance(cause, ValueError):
                    raise ValueError(first_line(cause)) from error
            raise


def _task(part: Part, *, reading: Reading) -> ReadTask:
    """Build the read task of a part, whose block is one row, still encoded."""
    read = functools.partial(read_part, part, reading=reading)
    return read_task(read, unit=part.unit, num_rows=1)
