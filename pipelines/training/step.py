"""Take one training step in plain PyTorch: no Ray, no MLflow, no DALI.

A step is one update of the weights, from one or more micro-batches. When to log, to
write a checkpoint or to stop is up to the caller.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipelines.config import Run
from pipelines.data.batch import Batch, Position
from pipelines.hardware.device import (
    autocast_dtype,
    is_out_of_memory,
    release_memory,
)
from pipelines.hardware.row_limit import RowLimit
from pipelines.rng import Purpose, key
from pipelines.training.metrics import (
    MetricSums,
    class_weights,
    smooth_targets,
    soft_cross_entropy,
)
from pipelines.training.mixup import draw_mix, mix
from pipelines.training.model import is_sharded
from pipelines.training.optimizer import learning_rate, set_learning_rate
from pipelines.training.state import TrainState, update_average

_NOT_DETERMINISTIC = " does not have a deterministic implementation"
_COMPILERS = ("torch._dynamo", "torch._inductor")
_MINUTES_WHILE_FEW = 5.0


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """Inputs of a step beside state and batch, constant throughout a run."""

    run: Run
    num_classes: int
    steps_per_epoch: int
    images_per_epoch: int
    """Images of which an epoch may have a share of bad ones; none counts twice."""
    device: torch.device
    world_size: int = 1
    rank: int = 0
    class_counts: tuple[int, ...] = ()
    """Training images of each class; only needed where the loss weighs classes."""

    @cached_property
    def class_weights(self) -> Tensor | None:
        """Factors of the classes' terms of the loss: float32 (K,), on the device."""
        kind = self.run.optim.class_weights
        if kind == "none":
            return None
        return class_weights(np.array(self.class_counts), kind=kind).to(self.device)

    @property
    def checkpoint_every_minutes(self) -> float:
        """The run's minutes, capped at a few while workers are missing."""
        minutes = self.run.checkpoint_every_minutes
        # When they come back, all start again from the last checkpoint.
        if minutes and self.world_size < self.run.scale.world_size:
            return min(minutes, _MINUTES_WHILE_FEW)
        return minutes


def step_from(batch: Batch, batches: Iterator[Batch]) -> Iterator[Batch]:
    """Yield the micro-batches of the step that `batch` begins, and no further.

    Each is requested when the one before is done, so that a step waits for images
    between micro-batches. A worker alone keeps them, to start the step over.
    """
    yield batch
    while not batch.ends_step:
        following = next(batches, None)
        if following is None:
            return
        batch = following
        yield batch


def train_step(
    state: TrainState,
    micro_batches: Iterable[Batch],
    *,
    settings: TrainSettings,
    sums: MetricSums,
) -> None:
    """Update the weights once, after forward and backward of each micro-batch.

    Never waits for the device: `state.guard.check` finds losses that were not finite.

    Where memory runs out, a worker alone starts the step over with its micro-batches
    cut smaller, and keeps to that: it learns what a plan with so many micro-batches
    would have it learn, bit for bit. Of several workers, some may have sent gradients
    by then: the error is raised, and they cut smaller after their restart.

    Args:
        micro_batches: This worker's share of one global batch, as of `step_from`.
        sums: Accumulates the loss and the accuracy of every image.

    Raises ValueError where the share ends before the step does, and where PyTorch can't
    do what a setting of the run asks for.
    """
    batches = _Replayed(micro_batches, keeps=settings.world_size == 1)
    before = sums.state()
    while num_rows := _try_step(state, batches, settings=settings, sums=sums):
        # The error is gone by here, and with it the frames that hold its tensors.
        _lower_limit(state.limit, num_rows, settings=settings)
        state.guard.undo(step=state.position.step)
        state.optimizer.zero_grad(set_to_none=True)
        sums.restore(before)
        release_memory(settings.device)
    last = batches.last
    # An update by a part of its gradients would be no step of the run.
    if last is None or not last.ends_step:
        raise ValueError(
            f"expected the micro-batches of step {state.position.step} up to its last, "
            "got fewer"
        )
    _end_step(state, last)


class _Replayed:
    """Micro-batches of a step, from the first again where the step starts over."""

    def __init__(self, batches: Iterable[Batch], *, keeps: bool) -> None:
        self._rest, self._keeps = iter(batches), keeps
        self._kept: list[Batch] = []
        self.last: Batch | None = None

    def __iter__(self) -> Iterator[Batch]:
        yield from tuple(self._kept)
        for batch in self._rest:
            if self._keeps:
                self._kept.append(batch)
            self.last = batch
            yield batch


def _try_step(
    state: TrainState,
    batches: Iterable[Batch],
    *,
    settings: TrainSettings,
    sums: MetricSums,
) -> int:
    """Compute a step's gradients; return 0, or the rows of a batch that did not fit."""
    _begin_step(state, settings=settings)
    for batch in batches:
        try:
            for part in batch.parts(state.limit.num_parts(batch.num_rows)):
                with step_errors():
                    _forward_backward(state, part, settings=settings, sums=sums)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if settings.world_size > 1:
                _lower_limit(state.limit, batch.num_rows, settings=settings)
                raise
            return batch.num_rows
    return 0


def _lower_limit(limit: RowLimit, num_rows: int, *, settings: TrainSettings) -> None:
    is_alone = settings.world_size == 1
    restart = "" if is_alone else ", after a restart from the last checkpoint"
    limit.lower(
        num_rows,
        doing="training",
        advice="set --scale.grad-checkpointing, a smaller --model.img-size or, with "
        "several GPUs, --scale.sharding fsdp",
        note=f"{restart} (the batch stays {settings.run.data.batch_size})",
    )


def seed_step(step: int, *, settings: TrainSettings) -> None:
    """Seed a step's draws, dropout and drop path, from its number and the rank."""
    # Of nothing else, so that a resumed run draws what an unbroken one would have.
    torch.manual_seed(key(settings.run.seed, step, settings.rank, Purpose.STEP) >> 1)


def mixed(batch: Batch, *, settings: TrainSettings) -> tuple[Tensor, Tensor]:
    """Return a batch's mixed images, and its smoothed, weighted and mixed targets."""
    run = settings.run
    targets = smooth_targets(
        batch.labels,
        num_classes=settings.num_classes,
        smoothing=run.optim.label_smoothing,
    )
    if settings.class_weights is not None:
        # As PyTorch weighs soft targets; mixing is linear, so it may come after.
        targets = targets * settings.class_weights
    # By the batch's place alone: all workers mix a step's images by the same share.
    draw_key = key(run.seed, batch.epoch, batch.index, batch.micro, Purpose.MIX)
    draw = draw_mix(run.optim, key=draw_key)
    if draw is None:
        return batch.images, targets
    return mix(batch.images, targets, draw=draw)


def _begin_step(state: TrainState, *, settings: TrainSettings) -> None:
    optim, step = settings.run.optim, state.position.step
    seed_step(step, settings=settings)
    # Of the step alone too: an optimiser's checkpoint need not hold a schedule's state.
    lr = learning_rate(step, optim=optim, steps_per_epoch=settings.steps_per_epoch)
    set_learning_rate(state.optimizer, lr=lr)
    state.guard.begin()


def _forward_backward(
    state: TrainState, batch: Batch, *, settings: TrainSettings, sums: MetricSums
) -> None:
    images, targets = mixed(batch, settings=settings)
    # Gradients are sent between workers once a step, with the last micro-batch.
    no_sync = getattr(state.forward, "no_sync", contextlib.nullcontext)
    with contextlib.nullcontext() if batch.ends_step else no_sync():
        with autocast(settings.device, amp=settings.run.scale.amp):
            logits = state.forward(images)
        losses = soft_cross_entropy(logits, targets)
        # Data parallelism averages over workers: this makes it the mean over the
        # global batch, however its rows lie on the workers.
        scale = settings.world_size / batch.global_rows
        ((losses * batch.weights).sum() * scale).backward()
    counted = state.guard.observe(batch, losses, step=state.position.step)
    sums.add(logits, batch.labels, batch.weights, counted, num_bad=batch.num_bad)


def _end_step(state: TrainState, batch: Batch) -> None:
    position = state.position
    state.frozen.drop_gradients(state.model, epoch=position.epoch)
    # Before the optimiser, which skips a bad step by what this leaves on the device.
    state.guard.mask_bad_step(step=position.step)
    state.optimizer.step()
    state.guard.end()
    # Freed, not filled: the memory serves the next step's activations.
    state.optimizer.zero_grad(set_to_none=True)
    if state.ema is not None:
        update_average(state.ema.module, state.model, decay=state.ema.decay)
    step = position.step + 1
    if batch.ends_epoch:
        state.position = Position(epoch=position.epoch + 1, batch=0, step=step)
    else:
        state.position = Position(
            epoch=position.epoch, batch=batch.index + 1, step=step
        )


@contextlib.contextmanager
def step_errors() -> Iterator[None]:
    """Convert PyTorch's errors that a setting of the run causes into ValueErrors.

    They are not retryable: a restart would cause them again.
    """
    try:
        yield
    except RuntimeError as error:
        first = next(iter(str(error).strip().splitlines()), "")
        if _NOT_DETERMINISTIC in first:
            raise ValueError(
                "scale.deterministic: expected a model of operations that this device "
                "has deterministic kernels for, got one with "
                f"{first.partition(_NOT_DETERMINISTIC)[0]}; set "
                "--scale.no-deterministic, or take a model without it (of GSoP, the "
                "attention channel in model.kwargs)"
            ) from error
        if type(error).__module__.startswith(_COMPILERS):
            raise ValueError(
                "scale.compile: expected a step that torch.compile can compile, got "
                f"{type(error).__name__}: {first}; set --scale.no-compile"
            ) from error
        raise


def autocast(
    device: torch.device, *, amp: str
) -> contextlib.AbstractContextManager[Any]:
    """Autocast to bfloat16 where `Scale.amp` asks for it and the device has it."""
    enabled = autocast_dtype(device, amp=amp) != torch.float32
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


@dataclass(frozen=True, kw_only=True)
class Forward:
    """Forward pass of evaluation, with all it depends on beside the model."""

    device: torch.device
    amp: str
    """As `Scale.amp`."""
    mirror: bool = False
    """Whether to average the logits of an image and of its mirror image."""

    @classmethod
    def of(cls, run: Run, *, device: torch.device) -> Forward:
        """Build it from a run's precision and its `data.eval_mirror`."""
        return cls(device=device, amp=run.scale.amp, mirror=run.data.eval_mirror)

    def __call__(self, model: nn.Module, images: Tensor) -> Tensor:
        """Compute the logits (B, K) of images (B, 3, H, W)."""
        with autocast(self.device, amp=self.amp):
            logits = model(images)
            if self.mirror:
                logits = (logits + model(images.flip(-1))) / 2
        return logits


@dataclass(frozen=True, kw_only=True)
class FittingForward:
    """Forward pass of as many images at a time as fit into memory.

    Each worker finds that for itself. A sharded model's error is raised as it is: the
    other workers wait for its parts.
    """

    forward: Forward
    limit: RowLimit

    def __call__(self, model: nn.Module, images: Tensor) -> Tensor:
        """Compute the logits (B, K) of images (B, 3, H, W)."""
        while (logits := self._try(model, images)) is None:
            self.limit.lower(
                len(images),
                doing="evaluation",
                advice="set a smaller --model.img-size",
            )
            release_memory(self.forward.device)
        return logits

    def _try(self, model: nn.Module, images: Tensor) -> Tensor | None:
        size = math.ceil(len(images) / self.limit.num_parts(len(images)))
        try:
            return torch.cat([self.forward(model, part) for part in images.split(size)])
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or is_sharded(model.parameters()):
                raise
            return None
