"""Define what `benchmarks.model` trains: networks of equal size, stage by stage."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch

from pipelines.config import Model, Run, Scale
from pipelines.config.recipes import load_recipe
from pipelines.hardware.device import has_bfloat16
from pipelines.training.model_cost import count_macs, count_parameters, shapes_of

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
