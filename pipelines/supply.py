"""Give one worker its batches of a split: a stream, a decoder and a thread."""

from __future__ import annotations

import functools
from collections.abc import Iterator

from pipelines.checkpoint import Position
from pipelines.ingest.batch import Batch
from pipelines.ingest.decoder import decode_rows, make_decoder
from pipelines.ingest.feed import Shape, batches
from pipelines.ingest.footers import ShardSet
from pipelines.ingest.prefetch import Prefetcher
from pipelines.ingest.stream import (
    EpochStream,
    Open,
    evaluation_plan,
    training_plan,
)
from pipelines.loop import LoopSettings


class Supply:
    """Iterate over the batches of all epochs that are left, decoded ahead.

    Breaking off the iteration and beginning again goes on with the next batch, so that
    one supply serves many evaluations.

    Args:
        start: Where to begin; evaluation begins with a whole epoch.
        open_units: Starts reading units on all workers; see `EpochStream`.
    """

    def __init__(
        self,
        shards: ShardSet,
        *,
        settings: LoopSettings,
        train: bool,
        start: Position,
        open_units: Open,
    ) -> None:
        run = settings.run
        self._settings = settings
        self._train = train
        self._batches: Iterator[Batch] | None = None
        self._prefetcher: Prefetcher | None = None
        if train:
            plan = functools.partial(
                training_plan, shards, data=run.data, seed=run.seed
            )
        else:
            plan = functools.partial(evaluation_plan, shards, data=run.data)
        self._stream = EpochStream(
            plan=(lambda epoch: plan(epoch=epoch)) if settings.rank == 0 else None,
            open_units=open_units,
            units_per_epoch=plan(epoch=0).num_units,
            start=start if train else Position(epoch=start.epoch),
            num_epochs=run.optim.total_epochs,
        )

    def start(self) -> None:
        """Begin to read and decode ahead."""
        settings, data = self._settings, self._settings.run.data
        optim, img_size = settings.run.optim, settings.run.model.img_size
        batch_size = data.batch_size if self._train else data.eval_batch_size
        shape = Shape(
            share_rows=-(-batch_size // settings.world_size),
            num_micro=optim.num_accumulation if self._train else 1,
        )
        decoder = make_decoder(
            data,
            img_size=img_size,
            batch_size=shape.micro_rows,
            train=self._train,
            device=settings.device,
        )
        decode = decode_rows(
            decoder,
            data=data,
            img_size=img_size,
            seed=settings.run.seed,
            train=self._train,
        )
        items = batches(
            self._stream.tables(), shape=shape, decode=decode, device=settings.device
        )
        self._prefetcher = Prefetcher(
            items, num_items=data.num_prefetch_batches, device=settings.device
        )
        self._batches = iter(self._prefetcher)

    def __iter__(self) -> Iterator[Batch]:
        assert self._batches is not None, "start the supply first"
        return self._batches

    def epoch_ended(self, epoch: int) -> None:
        """Make a further dataset ready where one is used up; all workers call it."""
        self._stream.epoch_ended(epoch)

    def close(self) -> None:
        """End the thread; safe at any moment."""
        if self._prefetcher is not None:
            self._prefetcher.close()
