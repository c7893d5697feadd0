"""Define what `benchmarks.model` trains: networks of equal size, stage by stage."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import timm
import torch
from timm.data.mixup import Mixup
from timm.loss import SoftTargetCrossEntropy  # pyright: ignore[reportPrivateImportUsage]
from timm.optim import create_optimizer_v2  # pyright: ignore[reportPrivateImportUsage]
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn

from pipelines.config import Model, Run, Scale
from pipelines.config.recipes import load_recipe
from pipelines.data.batch import Batch
from pipelines.hardware.device import has_bfloat16, is_gpu
from pipelines.training.metrics import MetricSums
from pipelines.training.model import count_macs, count_parameters, shapes_of
from pipelines.training.state import build_state
from pipelines.training.step import TrainSettings, train_step

NUM_CLASSES = 1000
# Of timm's plain ViTs and DeiTs for 224 pixels the one whose parameters come nearest.
RIVALS: Mapping[str, str] = MappingProxyType(
    {
        "so_vit_7": "deit_tiny_patch16_224",
        "so_vit_10": "vit_xsmall_patch16_clip_224",
        "so_vit_14": "deit_small_patch16_224",
        "so_vit_19": "deit3_medium_patch16_224",
        "sot_tiny": "vit_xsmall_patch16_clip_224",
        "sot_small": "deit_small_patch16_224",
        "sot_base": "deit_base_patch16_224",
    }
)
Subject = Literal["ours", "class", "timm"]
"""Ours; ours with the plain class-token head; timm's of equal size."""
SUBJECTS: tuple[Subject, ...] = ("ours", "class", "timm")
# No step of a round is one that metrics are logged at: to ask for them waits.
_NEVER = 10**9
_STEPS_PER_EPOCH = 1000
Steps = Callable[[int], None]
"""Trains for so many steps, and gives a device work without waiting for it."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A variant of the training step; each stage adds to an earlier one."""

    adds: str
    is_plain: bool = False
    amp: bool = False
    channels_last: bool = False
    compile: bool = False
    grad_checkpointing: bool = False


STAGES: Mapping[str, Stage] = MappingProxyType(
    {
        "plain": Stage(
            adds="as a script with timm: eager, float16 autocast on a GPU, float32 on "
            "a CPU",
            is_plain=True,
        ),
        "eager": Stage(adds="the loop's step, eager, float32"),
        "bfloat16": Stage(adds="and bfloat16 autocast", amp=True),
        "channels_last": Stage(adds="and channels last", amp=True, channels_last=True),
        "compile": Stage(
            adds="and torch.compile", amp=True, channels_last=True, compile=True
        ),
        "checkpointing": Stage(
            adds="channels_last and gradient checkpointing",
            amp=True,
            channels_last=True,
            grad_checkpointing=True,
        ),
    }
)


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is trained, how, and where."""

    model: str
    """Of ours, whose recipe is taken; for timm's too."""
    subject: Subject
    stage: str
    batch_size: int
    img_size: int
    device: str
    num_threads: int
    sizes: tuple[tuple[str, int], ...] = ()
    """Arguments of the network, of ours and timm's alike, instead of its own sizes."""

    @property
    def label(self) -> str:
        """The network's name."""
        if self.subject == "timm":
            return RIVALS[self.model]
        return f"{self.model}, class token" if self.subject == "class" else self.model

    @property
    def dtype(self) -> torch.dtype:
        """The type that the step's products are computed in."""
        stage, device = STAGES[self.stage], torch.device(self.device)
        if stage.is_plain:
            return torch.float16 if device.type == "cuda" else torch.float32
        in_half = stage.amp and has_bfloat16(device)
        return torch.bfloat16 if in_half else torch.float32


@dataclass(frozen=True, kw_only=True)
class Size:
    """A network's parameters, and one image's multiply-adds in the forward pass."""

    num_params: int
    macs: int


def run_of(case: Case) -> Run:
    """Build the run: the recipe's on one worker, with the stage's settings."""
    run, stage = load_recipe(f"imagenet.{case.model}"), STAGES[case.stage]
    return dataclasses.replace(
        run,
        model=_model_of(case, model=run.model),
        data=dataclasses.replace(run.data, batch_size=case.batch_size),
        scale=Scale(
            num_workers=0,
            amp="auto" if stage.amp else "off",
            compile=stage.compile,
            grad_checkpointing=stage.grad_checkpointing,
        ),
        log_every_steps=_NEVER,
        checkpoint_every_minutes=0.0,
    )


def _model_of(case: Case, *, model: Model) -> Model:
    if case.subject == "timm":
        return dataclasses.replace(
            model,
            name=RIVALS[case.model],
            img_size=case.img_size,
            pooling=None,
            kwargs={"img_size": case.img_size, **dict(case.sizes)},
        )
    fusion = {"fusion": "class"} if case.subject == "class" else {}
    kwargs: dict[str, int | float | str] = {**dict(case.sizes), **fusion}
    return dataclasses.replace(model, img_size=case.img_size, kwargs=kwargs)


def size_of(case: Case) -> Size:
    """Count a network's size on the meta device."""
    model = shapes_of(run_of(case).model, num_classes=NUM_CLASSES)
    return Size(
        num_params=count_parameters(model).num,
        macs=count_macs(model, img_size=case.img_size),
    )


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
