"""Run the Ray Data job that writes a token set's files."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Mapping, Sequence

import ray
from ray.data import (
    ActorPoolStrategy,
    DataContext,
    Datasource,
    ReadTask,
    read_datasource,
)
from ray.data.block import BlockMetadata

from pipelines.failures import causes, first_line
from pipelines.ingest.reading import Reading
from pipelines.ingest.source import CPUS_PER_READ
from pipelines.session import per_worker, ray_session
from tuning.tokens.backbone import Backbone
from tuning.tokens.parts import Part, read_part
from tuning.tokens.writer import NUM_IMAGES, TokenJob, WriterActor


def write_parts(
    parts: Sequence[Part],
    *,
    jobs: Mapping[str, TokenJob],
    readings: Mapping[str, Reading],
    backbone: Backbone,
) -> Iterator[int]:
    """Write parts on the run's workers; yield the number of images as each is done.

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
            PartSource(parts, readings=readings),
            num_cpus=CPUS_PER_READ,
            concurrency=run.data.num_readers,
            override_num_blocks=len(parts),
            label_selector=_labels(run.data.reader_label),
        )
        done = units.map_batches(
            WriterActor,
            # A block is one row that holds a whole unit.
            batch_size=None,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(size=min(scale.num_workers, len(parts))),
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


class PartSource(Datasource):
    """Offer parts as read tasks; each gives a block of one row, still encoded."""

    def __init__(
        self, parts: Sequence[Part], *, readings: Mapping[str, Reading]
    ) -> None:
        super().__init__()
        self._parts = parts
        self._readings = readings

    def estimate_inmemory_data_size(self) -> int | None:
        """Decline to guess."""
        return None

    def get_read_tasks(
        self,
        parallelism: int,
        per_task_row_limit: int | None = None,
        data_context: DataContext | None = None,
    ) -> list[ReadTask]:
        """Make one task a part, whatever parallelism Ray would like."""
        return [self._task(part) for part in self._parts]

    def _task(self, part: Part) -> ReadTask:
        read = functools.partial(read_part, part, reading=self._readings[part.split])
        metadata = BlockMetadata(
            num_rows=1,
            size_bytes=None,
            input_files=tuple({item.path: None for item in part.unit.slices}),
            exec_stats=None,
        )
        return ReadTask(read, metadata)


def _labels(reader_label: str) -> dict[str, str] | None:
    label, _, value = reader_label.partition("=")
    return {label: value} if label else None
