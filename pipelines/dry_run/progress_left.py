"""Count a run's remaining images and steps, and describe its shard sets."""

from __future__ import annotations

from dataclasses import dataclass

from pipelines.config import Run
from pipelines.data.batch import Position
from pipelines.data.loader import Plans
from pipelines.data.shard_set import ShardSet
from pipelines.storage.path import StoragePath
from pipelines.storage.retry import answering


@dataclass(frozen=True, kw_only=True)
class SetFacts:
    """Facts about a shard set."""

    address: str
    """Without credentials."""
    num_images: int
    num_shards: int
    num_bytes: int
    """Of the shards' files."""


@dataclass(frozen=True, kw_only=True)
class Remaining:
    """A run's remaining steps and images, from its position to its end."""

    steps_per_epoch: int
    """Of the first epoch; with repeated augmentation later ones may have one less."""
    num_steps: int
    """Of the whole run."""
    num_steps_done: int
    last_batch_size: int
    """Images of an epoch's last step."""
    num_images_left: int
    """Images to train on, repetitions included."""
    num_evaluated_left: int
    """Images to send through a model in evaluations, each weight's, mirrored ones
    too."""


def facts_of(shards: ShardSet) -> SetFacts:
    """Describe a shard set, with one request per thousand files of a bucket."""
    place = StoragePath(shards.address)
    with answering():
        files = [info for info in place.entries() if info.path.endswith(".parquet")]
    return SetFacts(
        address=str(place),
        num_images=shards.groups.total_rows,
        num_shards=len(shards.groups.paths),
        num_bytes=sum(info.size for info in files),
    )


def remaining_of(
    run: Run, *, train_shards: ShardSet, num_held_out: int, start: Position
) -> Remaining:
    """Count a run's steps and images from a position to its end."""
    plans = Plans(shards=train_shards, run=run, train=True)
    num_epochs = run.optim.total_epochs
    shapes = [plans.shape(epoch) for epoch in range(num_epochs)]
    first = shapes[0]
    last_rows = first.num_rows - (first.num_batches - 1) * first.batch_size
    num_done = sum(shape.num_images for shape in shapes[: start.epoch])
    num_done += start.batch * first.batch_size * first.num_repeats
    return Remaining(
        steps_per_epoch=first.num_batches,
        num_steps=sum(shape.num_batches for shape in shapes),
        num_steps_done=start.step,
        last_batch_size=last_rows * first.num_repeats,
        num_images_left=sum(shape.num_images for shape in shapes) - num_done,
        num_evaluated_left=num_held_out * _passes_left(run, start=start),
    )


def _passes_left(run: Run, *, start: Position) -> int:
    """Count the remaining passes over the held-out images."""
    validation, num_epochs = run.validation, run.optim.total_epochs
    ends = range(start.epoch + 1, num_epochs + 1)
    num_evaluations = sum(validation.is_due(end, num_epochs=num_epochs) for end in ends)
    has_both = bool(run.optim.ema_decay) and validation.weights == "both"
    return num_evaluations * (1 + has_both) * (1 + run.data.eval_mirror)
