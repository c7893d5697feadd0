"""Build the training steps that `benchmarks.model` times.

Ours are the training's own, on random images: mixing, forward, backward, optimiser and
moving average, as the recipe has them. The plain step is the same work as a script with
timm does it.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import timm
import torch
from timm.data.mixup import Mixup
from timm.loss import SoftTargetCrossEntropy  # pyright: ignore[reportPrivateImportUsage]
from timm.optim import create_optimizer_v2  # pyright: ignore[reportPrivateImportUsage]
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn

from benchmarks.model_cases import NUM_CLASSES, STAGES, Case, run_of
from pipelines.config import Model
from pipelines.data.batch import Batch
from pipelines.hardware.device import is_gpu
from pipelines.training.metrics import MetricSums
from pipelines.training.state import build_state
from pipelines.training.step import TrainSettings, train_step

_STEPS_PER_EPOCH = 1000
Steps = Callable[[int], None]
"""Trains for so many steps, and gives a device work without waiting for it."""


def build_steps(case: Case) -> Steps:
    """Build a case's model, and all else that its steps need, on its device."""
    torch.set_num_threads(case.num_threads)
    return _plain_steps(case) if STAGES[case.stage].is_plain else _loop_steps(case)


def _loop_steps(case: Case) -> Steps:
    run, device = run_of(case), torch.device(case.device)
    state = build_state(run, num_classes=NUM_CLASSES, device=device)
    is_channels_last = STAGES[case.stage].channels_last
    if not is_channels_last:
        assert state.ema is not None
        for module in (state.model, state.ema.module):
            make_contiguous(module)
    settings = TrainSettings(
        run=run,
        num_classes=NUM_CLASSES,
        steps_per_epoch=_STEPS_PER_EPOCH,
        images_per_epoch=_STEPS_PER_EPOCH * case.batch_size,
        device=device,
    )
    batch = _random_batch(case, is_channels_last=is_channels_last)

    sums = MetricSums(device)

    def steps(num: int) -> None:
        state.forward.train()
        first = state.position.batch
        for index in range(first, first + num):
            micro_batches = [dataclasses.replace(batch, index=index)]
            train_step(state, micro_batches, settings=settings, sums=sums)
            # As the workers' loop does: a GPU would have to be waited for.
            if not is_gpu(device):
                state.guard.check()

    return steps


def make_contiguous(module: nn.Module) -> None:
    """Undo channels last in all weights of a module."""
    # Not by `Module.to`, which keeps strides where a size is 1 and both fit.
    for parameter in module.parameters():
        parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)


def _random_batch(case: Case, *, is_channels_last: bool) -> Batch:
    images, labels = _random_images(case)
    if is_channels_last:
        images = images.to(memory_format=torch.channels_last)
    return Batch(
        images=images,
        labels=labels,
        weights=torch.ones(case.batch_size, device=images.device),
        draw_ids=np.arange(case.batch_size),
        epoch=0,
        index=0,
        micro=0,
        global_rows=case.batch_size,
        ends_step=True,
        ends_epoch=False,
    )


def _random_images(case: Case) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    size = (case.batch_size, 3, case.img_size, case.img_size)
    images = torch.randn(size, generator=generator)
    labels = torch.randint(0, NUM_CLASSES, size[:1], generator=generator)
    return images.to(case.device), labels.to(case.device)


def _plain_steps(case: Case) -> Steps:
    run, device = run_of(case), torch.device(case.device)
    optim, on_gpu = run.optim, device.type == "cuda"
    torch.manual_seed(run.seed)
    model = _plain_model(run.model).to(device).train()
    optimizer = create_optimizer_v2(
        model, opt="adamw", lr=optim.warmup_lr, weight_decay=optim.weight_decay
    )
    scaler = torch.amp.GradScaler(device.type, enabled=on_gpu)
    average = ModelEmaV3(model, decay=optim.ema_decay)
    mixup = Mixup(
        mixup_alpha=optim.mixup,
        cutmix_alpha=optim.cutmix,
        switch_prob=optim.mix_switch,
        label_smoothing=optim.label_smoothing,
        num_classes=NUM_CLASSES,
    )
    criterion = SoftTargetCrossEntropy()
    images, labels = _random_images(case)

    def autocast() -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(device.type, torch.float16, enabled=on_gpu)

    def steps(num: int) -> None:
        for _ in range(num):
            # Mixes in place: again and again that only blurs images of noise.
            mixed, targets = mixup(images, labels)
            with autocast():
                loss = criterion(model(mixed), targets)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            average.update(model)

    return steps


def _plain_model(model: Model) -> nn.Module:
    kwargs: dict[str, Any] = {"img_size": model.img_size, **model.kwargs}
    return timm.create_model(
        model.name,
        num_classes=NUM_CLASSES,
        drop_path_rate=model.drop_path_rate,
        **kwargs,
    )
