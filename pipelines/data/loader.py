"""Loader of one worker's batches of a split: a stream, a decoder and a thread."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from pipelines.config import Run
from pipelines.data.batch import Batch
from pipelines.data.batching import Shape, batches
from pipelines.data.position import Position
from pipelines.data.prefetch import Prefetcher
from pipelines.data.reading import Reading
from pipelines.data.shard_set import ShardSet
from pipelines.data.stream import EpochStream, LocalOpener, Plans, ShardOpener
from pipelines.hardware.device import autocast_dtype, is_gpu
from pipelines.transforms.decoder import BatchDecoder
from pipelines.transforms.rows import BadImage
from pipelines.transforms.sampling import PixelSettings

OnBad = Callable[[tuple[BadImage, ...]], None]


def ignore_bad(bad: tuple[BadImage, ...]) -> None:
    """Ignore bad images; they are counted all the same."""


def pixel_settings(run: Run, *, train: bool) -> PixelSettings:
    """Extract from a run what decides the pixels of a split."""
    return PixelSettings(
        data=run.data,
        augment=run.augment,
        img_size=run.model.img_size,
        seed=run.seed,
        train=train,
    )


def image_dtype(run: Run, *, train: bool, device: torch.device) -> torch.dtype:
    """Choose the dtype of images: bfloat16 where a GPU's step rounds to it.

    Its autocast would round them before the first layer, so the numbers are the same
    and the traffic is half. They stay float32 where something else comes first: mixup,
    which would mix rounded numbers and round again, probes, which run without autocast,
    and evaluation, whose images are looked at. (Cutmix moves numbers as they are.)
    """
    is_first = train and not run.optim.mixup and not run.probe.every_steps
    if not is_gpu(device) or not is_first:
        return torch.float32
    return autocast_dtype(device, amp=run.scale.amp)


def reading_of(
    shards: ShardSet, *, run: Run, train: bool = False, num_workers: int = 1
) -> Reading:
    """Describe how a split's units are read."""
    decodes = run.data.decode_on == "readers"
    return Reading(
        address=shards.address,
        num_classes=len(shards.classes),
        num_workers=num_workers,
        decode=pixel_settings(run, train=train) if decodes else None,
    )


class Loader:
    """Iterator over the batches of all remaining epochs, decoded ahead.

    Breaking off the iteration and starting again resumes with the next batch, so that
    one loader serves many evaluations.

    Args:
        start: Where to start; evaluation starts with a whole epoch.
        opener: Starts reading units on all workers.
        num_epochs: Where the batches end; the run's epochs by default.
        on_bad: Called, on a thread, with images that can't be decoded.
    """

    def __init__(
        self,
        shards: ShardSet,
        *,
        run: Run,
        train: bool,
        start: Position,
        opener: ShardOpener,
        device: torch.device,
        num_epochs: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        on_bad: OnBad = ignore_bad,
    ) -> None:
        self._run, self._train, self._device = run, train, device
        self._world_size = world_size
        self._on_bad = on_bad
        self._batches: Iterator[Batch] | None = None
        self._prefetcher: Prefetcher | None = None
        self._stream = EpochStream(
            Plans(shards=shards, run=run, train=train),
            opener=opener,
            is_planner=rank == 0,
            start=start if train else replace(start, batch=0),
            num_epochs=num_epochs or run.optim.total_epochs,
        )

    def start(self) -> None:
        """Start to read and decode ahead."""
        run, data = self._run, self._run.data
        batch_size = data.batch_size if self._train else data.eval_batch_size
        shape = Shape(
            share_rows=-(-batch_size // self._world_size),
            num_micro=run.num_micro(self._world_size) if self._train else 1,
        )
        decode = BatchDecoder(
            pixel_settings(run, train=self._train),
            num_rows=shape.micro_rows,
            device=self._device,
            dtype=image_dtype(run, train=self._train, device=self._device),
            on_bad=self._on_bad,
        )
        items = batches(
            self._stream.tables(), shape=shape, decode=decode, device=self._device
        )
        self._prefetcher = Prefetcher(
            items, num_items=data.num_prefetch_batches, device=self._device
        )
        self._batches = iter(self._prefetcher)

    def __iter__(self) -> Iterator[Batch]:
        assert self._batches is not None, "start the supply first"
        for batch in self._batches:
            # All workers take the same batches, so they open the next segment in step.
            self._stream.reached(batch.epoch, batch.index)
            yield batch

    def close(self) -> None:
        """Stop the thread; safe at any moment."""
        if self._prefetcher is not None:
            self._prefetcher.close()


@contextlib.contextmanager
def opened_here(
    shards: ShardSet,
    *,
    run: Run,
    device: torch.device,
    train: bool = False,
    on_bad: OnBad = ignore_bad,
) -> Iterator[Loader]:
    """Open a loader in this process without Ray: evaluation's epoch, or the run's."""
    supply = Loader(
        shards,
        run=run,
        train=train,
        start=Position(),
        opener=LocalOpener(reading_of(shards, run=run, train=train)),
        device=device,
        num_epochs=None if train else 1,
        on_bad=on_bad,
    )
    supply.start()
    try:
        yield supply
    finally:
        supply.close()
