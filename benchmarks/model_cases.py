"""Define what `benchmarks.model` trains: networks of equal size, stage by stage."""

from __future__ import annotations

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
# What a stage sets of `Scale`, beside one worker, and whether it is channels last.
_LAST = {"amp": "auto", "channels_last": True}
STAGES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "plain": {},
        "eager": {},
        "bfloat16": {"amp": "auto"},
        "channels_last": _LAST,
        "compile": {**_LAST, "compile": True},
        "checkpointing": {**_LAST, "grad_checkpointing": True},
    }
)
# No step of a round is one that metrics are logged at: to ask for them waits.
_NEVER = 10**9
_STEPS_PER_EPOCH = 1000
Steps = Callable[[int], None]
"""Trains for so many steps, and gives a device work without waiting for it."""


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
        if self.stage == "plain":
            return torch.float16 if self.device == "cuda" else torch.float32
        in_half = "amp" in STAGES[self.stage]
        has_half = in_half and has_bfloat16(torch.device(self.device))
        return torch.bfloat16 if has_half else torch.float32


def run_of(case: Case) -> Run:
    """Build the run: the recipe's on one worker, with the stage's settings."""
    run = load_recipe(f"imagenet.{case.model}")
    scale = {"amp": "off", "compile": False, **STAGES[case.stage]}
    scale.pop("channels_last", None)
    return dataclasses.replace(
        run,
        model=_model_of(case, model=run.model),
        data=dataclasses.replace(run.data, batch_size=case.batch_size),
        scale=Scale(num_workers=0, **scale),
        log_every_steps=_NEVER,
        checkpoint_every_minutes=0.0,
    )


def _model_of(case: Case, *, model: Model) -> Model:
    kwargs: dict[str, int | float | str] = dict(case.sizes)
    if case.subject == "class":
        kwargs["fusion"] = "class"
    if case.subject == "timm":
        kwargs["img_size"] = case.img_size
        model = dataclasses.replace(model, name=RIVALS[case.model], pooling=None)
    return dataclasses.replace(model, img_size=case.img_size, kwargs=kwargs)


def build_steps(case: Case) -> Steps:
    """Build a case's model, and all else that its steps need, on its device."""
    torch.set_num_threads(case.num_threads)
    return _plain_steps(case) if case.stage == "plain" else _loop_steps(case)


def _loop_steps(case: Case) -> Steps:
    run, device = run_of(case), torch.device(case.device)
    state = build_state(run, num_classes=NUM_CLASSES, device=device)
    if "channels_last" not in STAGES[case.stage]:
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
    batch, sums = _random_batch(case), MetricSums(device)

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


def _random_batch(case: Case) -> Batch:
    images, labels = _random_images(case)
    if "channels_last" in STAGES[case.stage]:
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
    """Build the steps of a script with timm."""
    run, device = run_of(case), torch.device(case.device)
    optim, settings, on_gpu = run.optim, run.model, case.device == "cuda"
    torch.manual_seed(run.seed)
    model = timm.create_model(
        settings.name,
        num_classes=NUM_CLASSES,
        drop_path_rate=settings.drop_path_rate,
        **{"img_size": case.img_size, **settings.kwargs},  # pyright: ignore[reportArgumentType]
    )
    model.to(device).train()
    optimizer = create_optimizer_v2(
        model, opt="adamw", lr=optim.warmup_lr, weight_decay=optim.weight_decay
    )
    scaler = torch.amp.GradScaler(case.device, enabled=on_gpu)
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

    def steps(num: int) -> None:
        for _ in range(num):
            # Mixes in place: again and again that only blurs images of noise.
            mixed, targets = mixup(images, labels)
            with torch.autocast(case.device, torch.float16, enabled=on_gpu):
                loss = criterion(model(mixed), targets)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            average.update(model)

    return steps
