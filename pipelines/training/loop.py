"""Train in plain PyTorch: no Ray, no MLflow, no DALI.

The loop takes batches from an iterator and calls back with plain numbers. It knows
steps; epochs are marks on the batches.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn

from pipelines.config import Run
from pipelines.data.batch import Batch
from pipelines.data.position import Position
from pipelines.hardware.device import autocast_dtype, is_gpu
from pipelines.rng import Purpose, key
from pipelines.training.fsdp import update_average
from pipelines.training.metrics import MetricSums
from pipelines.training.mixup import draw_mix, mix, smooth_targets, soft_cross_entropy
from pipelines.training.nonfinite import KeysOf, NonFiniteGuard
from pipelines.training.optimizer import (
    current_learning_rate,
    learning_rate,
    set_learning_rate,
)
from pipelines.training.step_errors import step_errors
from pipelines.training.throughput import Throughput

_MINUTES_WHILE_FEW = 5.0


@dataclass(kw_only=True)
class TrainState:
    """Hold what changes while a run trains."""

    model: nn.Module
    """The bare model, whose weights are kept."""
    forward: nn.Module
    """The model as the step calls it: wrapped for data parallelism, or bare."""
    optimizer: torch.optim.Optimizer
    ema: ModelEmaV3 | None
    position: Position = field(default_factory=Position)
    guard: NonFiniteGuard | None = None
    """What watches for losses that are no numbers; `train` makes one where none is."""


@dataclass(frozen=True, kw_only=True)
class LoopSettings:
    """Say what a worker's loop needs to know beside the run."""

    run: Run
    num_classes: int
    steps_per_epoch: int
    images_per_epoch: int
    """Images that an epoch trains on, repetitions included."""
    device: torch.device
    world_size: int = 1
    rank: int = 0

    @property
    def checkpoint_every_minutes(self) -> float:
        """Give the run's, but no more than a few while workers are missing.

        When they come back, all start again from the last checkpoint.
        """
        minutes = self.run.checkpoint_every_minutes
        if minutes and self.world_size < self.run.scale.world_size:
            return min(minutes, _MINUTES_WHILE_FEW)
        return minutes

    def check_bad_share(self, num_bad: int) -> None:
        """Raise BadImagesError where too many of an epoch's images are bad."""
        check_bad_share(
            num_bad,
            num_images=self.images_per_epoch,
            max_share=self.run.data.max_bad_share,
        )

    @property
    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """Give bfloat16 autocast where the run wants it and the device can."""
        dtype = autocast_dtype(self.device, amp=self.run.scale.amp)
        enabled = dtype != torch.float32
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)

    @property
    def precision(self) -> str:
        """Name what most of a step computes in."""
        dtype = autocast_dtype(self.device, amp=self.run.scale.amp)
        return str(dtype).removeprefix("torch.")


class BadImagesError(ValueError):
    """Say that more images than allowed could not be decoded."""


def train(
    state: TrainState,
    batches: Iterable[Batch],
    *,
    settings: LoopSettings,
    on_log: Callable[[Mapping[str, float], Position], None],
    on_epoch_end: Callable[[TrainState], None],
    on_checkpoint: Callable[[TrainState], None] = lambda state: None,
    on_batch: Callable[[Batch, int], None] = lambda batch, step: None,
    on_step_begin: Callable[[TrainState, Batch], None] = lambda state, batch: None,
    on_note: Callable[[str], None] = lambda line: None,
    is_ending: Callable[[], bool] = lambda: False,
    is_leaving: Callable[[], bool] = lambda: False,
) -> None:
    """Train until the batches end, or until it is told to, and then a checkpoint.

    Args:
        on_log: gets means since the last call, on every worker alike.
        on_epoch_end: is called when an epoch's last batch was trained on.
        on_checkpoint: is called within an epoch where the run wants a checkpoint, on
            every worker at the same step.
        on_batch: is called with each micro-batch that was trained on, and its step.
        on_step_begin: is called before a step, with its first micro-batch.
        on_note: is called with what a person should see.
        is_ending: tells, each time metrics are due, whether to end before the run does.
        is_leaving: tells then whether a machine is about to be taken, so that each such
            time is one for a checkpoint.

    Raises NonFiniteLossError, naming the step, or RewindError, where the loss is not
    finite, and BadImagesError where too many images could not be decoded.
    """
    run = settings.run
    guard = state.guard = state.guard or guard_of(state, settings=settings)
    sums = MetricSums(settings.device)
    clock = Throughput()
    epoch_bad = 0
    state.forward.train()
    for batch in clock.waiting(batches):
        with step_errors():
            if batch.micro == 0:
                _begin_step(state, settings=settings)
                on_step_begin(state, batch)
                guard.begin()
            _forward_backward(state, batch, guard=guard, settings=settings, sums=sums)
        on_batch(batch, state.position.step)
        if not batch.ends_step:
            continue
        _end_step(state, batch, guard=guard)
        position = state.position
        every, is_last = run.checkpoint_every_steps, False
        is_due = every > 0 and position.step % every == 0
        is_logged = position.step % run.log_every_steps == 0 or batch.ends_epoch
        # To ask a GPU is to wait for it; no checkpoint is to follow a bad step.
        is_asked = is_logged or is_due or not is_gpu(settings.device)
        if is_asked and (line := guard.check()):
            on_note(line)
        if is_logged:
            # Workers' clocks differ: if one finds it is time, all of them do.
            is_time = is_leaving() or clock.is_time(settings.checkpoint_every_minutes)
            metrics = sums.total(votes={"is_time": is_time, "is_last": is_ending()})
            is_last = metrics.pop("is_last") > 0
            is_due = metrics.pop("is_time") > 0 or is_due or is_last
            epoch_bad += round(metrics.pop("num_bad"))
            settings.check_bad_share(epoch_bad)
            lr = current_learning_rate(state.optimizer)
            rates = clock.rates(metrics.pop("num_images"))
            metrics |= rates | {"lr": lr, "bad_images": epoch_bad}
            on_log(metrics, position)
        if batch.ends_epoch:
            epoch, epoch_bad = position.epoch + 1, 0
            state.position = Position(epoch=epoch, batch=0, step=position.step)
            on_epoch_end(state)
            state.forward.train()
            clock.restart(kept=True)
        elif is_due:
            with clock.pause():
                on_checkpoint(state)
        if is_last:
            return


def guard_of(
    state: TrainState, *, settings: LoopSettings, keys_of: KeysOf = lambda rows: {}
) -> NonFiniteGuard:
    """Make what watches a state's steps; `keys_of` gives the keys of rows."""
    return NonFiniteGuard(
        state.model,
        state.optimizer,
        optim=settings.run.optim,
        device=settings.device,
        rank=settings.rank,
        keys_of=keys_of,
        num_repeats=settings.run.augment.num_repeats,
    )


def check_bad_share(num_bad: int, *, num_images: int, max_share: float) -> None:
    """Raise BadImagesError where more than a share of a set's images is bad."""
    if num_bad > max_share * num_images:
        raise BadImagesError(
            f"wanted at most {max_share:.2%} of {num_images:,} images undecodable, "
            f"came {num_bad:,}, each named above and in MLflow's bad_images.csv; "
            "write the shards again with sovit-shards or raise --data.max-bad-share"
        )


def _begin_step(state: TrainState, *, settings: LoopSettings) -> None:
    run, step = settings.run, state.position.step
    # Drop path and dropout draw from the step and the rank alone, so that a resumed
    # run draws what an unbroken one would have drawn.
    torch.manual_seed(key(run.seed, step, settings.rank, Purpose.STEP) >> 1)
    lr = learning_rate(step, optim=run.optim, steps_per_epoch=settings.steps_per_epoch)
    set_learning_rate(state.optimizer, lr=lr)


def mixed(batch: Batch, *, settings: LoopSettings) -> tuple[Tensor, Tensor]:
    """Give the images and targets that a batch is trained on: smoothed, and mixed."""
    run = settings.run
    targets = smooth_targets(
        batch.labels,
        num_classes=settings.num_classes,
        smoothing=run.optim.label_smoothing,
    )
    draw_key = key(run.seed, batch.epoch, batch.index, batch.micro, Purpose.MIX)
    draw = draw_mix(run.optim, key=draw_key)
    if draw is None:
        return batch.images, targets
    return mix(batch.images, targets, draw=draw)


def _forward_backward(
    state: TrainState,
    batch: Batch,
    *,
    guard: NonFiniteGuard,
    settings: LoopSettings,
    sums: MetricSums,
) -> None:
    images, targets = mixed(batch, settings=settings)
    no_sync = getattr(state.forward, "no_sync", contextlib.nullcontext)
    with contextlib.nullcontext() if batch.ends_step else no_sync():
        with settings.autocast:
            logits = state.forward(images)
        losses = soft_cross_entropy(logits, targets)
        # Data parallelism averages over workers: this makes it the mean over the
        # global batch, however its rows lie on the workers.
        scale = settings.world_size / batch.global_rows
        ((losses * batch.weights).sum() * scale).backward()
    counted = guard.observe(batch, losses, step=state.position.step)
    sums.add(logits, batch.labels, batch.weights, counted, num_bad=batch.num_bad)


def _end_step(state: TrainState, batch: Batch, *, guard: NonFiniteGuard) -> None:
    guard.mask_bad_step(step=state.position.step)
    state.optimizer.step()
    guard.end()
    state.optimizer.zero_grad(set_to_none=True)
    if state.ema is not None:
        update_average(state.ema.module, state.model, decay=state.ema.decay)
    state.position = replace(
        state.position, batch=batch.index + 1, step=state.position.step + 1
    )


def share_buffers(module: nn.Module) -> None:
    """Give all workers rank 0's buffers: BatchNorm statistics differ by worker."""
    if dist.is_initialized():
        for buffer in module.buffers():
            dist.broadcast(buffer, src=0)


def predict(model: nn.Module, images: Tensor, *, settings: LoopSettings) -> Tensor:
    """Give the logits (B, K) of images (B, 3, H, W) as evaluation takes them.

    With `data.eval_mirror` they are the mean of the image's and its mirror image's.
    """
    with settings.autocast:
        logits = model(images)
        if settings.run.data.eval_mirror:
            logits = (logits + model(images.flip(-1))) / 2
    return logits
