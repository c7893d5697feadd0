"""Load as a training does: planned units through Ray Data, decoded in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pyarrow as pa
import torch

from benchmarks.work import Batches, Work, to_device
from pipelines.config import Augment, Data, Model, Optim, Run, Scale
from pipelines.data.epoch_plan import Unit
from pipelines.data.loader import Loader, reading_of
from pipelines.data.position import Position
from pipelines.data.ray_source import shares, split_units
from pipelines.data.reading import Reading
from pipelines.data.shard_set import read_shard_set

# More epochs than a round can see; datasets are opened a thousand units at a time.
_NUM_EPOCHS = 100_000
_POLICY = "rand-m9-mstd0.5-inc1"


class LocalSplit:
    """Opener of datasets for a single worker, on an existing Ray."""

    def __init__(self, reading: Reading, *, data: Data) -> None:
        self._reading = reading
        self._data = data
        self._plan: Callable[[], list[Unit]] = list

    def prepare(self, plan: Callable[[], list[Unit]]) -> None:
        """Keep the plan until the units are opened."""
        self._plan = plan

    def open(self) -> Iterator[pa.Table]:
        """Start a dataset and iterate over its tables."""
        (iterator,) = split_units(self._plan(), reading=self._reading, data=self._data)
        return shares(iterator, data=self._data)


def ours(work: Work, *, num_epochs: int = _NUM_EPOCHS) -> Batches:
    """Load shards as one worker of a training does, without Ray Train.

    Raises ValueError if the last batch would be padded: padding rows are not decoded
    images.
    """
    if work.num_images % work.batch_size:
        raise ValueError(
            f"expected a multiple of {work.batch_size} images, got {work.num_images}; "
            "set --num-images"
        )
    run = describe_run(work, num_epochs=num_epochs)
    shards = read_shard_set(run.data.train)
    reading = reading_of(shards, run=run, train=True)
    supply = Loader(
        shards,
        run=run,
        train=True,
        start=Position(),
        opener=LocalSplit(reading, data=run.data),
        device=torch.device(work.device),
    )
    supply.start()
    try:
        for batch in supply:
            yield to_device(batch.images, batch.labels, work=work)
    finally:
        supply.close()


def describe_run(work: Work, *, num_epochs: int) -> Run:
    """Build a run that reads the work's shards the way all loaders do."""
    shards = str(work.folder / "shards")
    return Run(
        recipe="benchmark",
        model=Model(name="so_vit_7", img_size=work.img_size),
        data=Data(
            train=shards,
            val=shards,
            batch_size=work.batch_size,
            num_decode_threads=work.num_threads,
        ),
        augment=Augment(
            crop_scale=work.scale,
            crop_ratio=work.ratio,
            hflip=work.hflip,
            interpolation="bilinear",
            auto_augment=_POLICY if work.rand_augment else "",
        ),
        optim=Optim(lr=1e-4, num_epochs=num_epochs, warmup_epochs=0),
        # All loaders give float32; a training on a GPU may take bfloat16.
        scale=Scale(amp="off"),
    )
