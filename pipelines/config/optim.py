"""Settings of the optimiser, its learning rate schedule, and the regularisers."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

from pipelines.config.checks import check_fields

ScheduleKind = Literal[
    "cosine", "step", "exponential", "polynomial", "linear", "piecewise", "constant"
]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Schedule of the learning rate after the warm-up.

    "step", "exponential" and "polynomial" move at the beginning of an epoch, as the
    papers' code does, the others by step.
    """

    kind: ScheduleKind = "cosine"
    milestones: tuple[float, ...] = ()
    """Epochs: where "step" multiplies by gamma, where a segment of "piecewise" ends."""
    gamma: float = 0.1
    """Factor at every milestone of "step", of every epoch of "exponential"."""
    power: float = 1.0
    """Exponent of "polynomial"."""
    end_epoch: float = 0.0
    """E of "polynomial": lr (1 - (e - 1) / (E - 1))^power in epoch e = 0, 1 ... As in
    the optimisation study's code the first epoch is above lr, and E is not the number
    of epochs."""
    values: tuple[float, ...] = ()
    """Rates of "piecewise" at its milestones; it begins with lr and is linear between
    them."""

    def __post_init__(self) -> None:
        rising = all(a < b for a, b in pairwise((0.0, *self.milestones)))
        has_points = self.kind in ("step", "piecewise")
        same = self.kind != "piecewise" or len(self.values) == len(self.milestones)
        check_fields(
            self,
            "optim.schedule.",
            milestones=(
                rising and bool(self.milestones) >= has_points,
                "rising epochs above 0, one at least for step and piecewise",
            ),
            gamma=(0 < self.gamma <= 1, "0 < gamma <= 1"),
            power=(self.power > 0, "above 0"),
            end_epoch=(self.kind != "polynomial" or self.end_epoch > 1, "above 1"),
            values=(
                same and min(self.values, default=0) >= 0,
                "a rate for each milestone of piecewise, at least 0",
            ),
        )


def _is_pattern(text: str) -> bool:
    try:
        re.compile(text)
    except re.error:
        return False
    return True


@dataclass(frozen=True, kw_only=True)
class Optim:
    """Optimiser, its schedule and the regularisers of the loss."""

    lr: float
    num_epochs: int
    """Epochs of the schedule, warm-up included."""
    cooldown_epochs: int = 0
    """Epochs after the schedule, at its last learning rate."""
    schedule: Schedule = field(default_factory=Schedule)
    warmup_epochs: float = 5
    warmup_lr: float = 1e-6
    min_lr: float = 1e-5
    """Learning rate at the cosine's end; other schedules have their own end."""
    classifier_lr_scale: float = 1.0
    """Factor of the classifier's learning rate: more than 1 for a fresh one."""
    layer_decay: float = 1.0
    """Factor of the learning rate from each layer to the one below it: 0.65 to 0.85 to
    fine-tune a transformer; 1 gives all layers the same rate."""
    freeze_layers: int = 0
    """Layers from the input on that are not trained, as timm's `group_matcher` counts
    them; -1 is all but the classifier: a linear probe."""
    freeze: str = ""
    """Regular expression: parameters whose names it matches are not trained."""
    unfreeze_epoch: int = 0
    """Epochs after which what is frozen is trained too; 0 is never."""
    optimizer: Literal["adamw", "sgd", "muon"] = "adamw"
    """muon: orthogonal steps for matrices and kernels of hidden layers, as long as
    AdamW's; AdamW for the classifier and all else."""
    weight_decay: float = 0.05
    decay_all: bool = False
    """Also decay biases and other parameters of one dimension."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's, beside Muon too."""
    eps: float = 1e-8
    """AdamW's."""
    momentum: float = 0.9
    """SGD's and Muon's, whose authors have 0.95."""
    clip_grad_norm: float = 0.0
    """Maximum norm of the gradients; 0 does not clip them."""
    num_accumulation: int = 1
    """Gradient accumulation: micro-batches of a worker's share of a batch; more of
    them where memory runs out."""
    class_weights: Literal["none", "inverse", "effective"] = "none"
    """Weights of the classes in the loss, where these are of unequal size: the inverse
    of each one's number of training images, or of its effective number."""
    label_smoothing: float = 0.1
    mixup: float = 0.0
    """Alpha of mixup's beta distribution; 0 is off."""
    cutmix: float = 0.0
    mix_switch: float = 0.5
    """Probability of cutmix where both are on."""
    ema_decay: float = 0.0
    """Decay of the weights' moving average (EMA); 0 keeps none."""
    on_nonfinite: Literal["stop", "skip", "rewind"] = "stop"
    """What to do when loss or gradients are NaN or infinite: stop the run, skip the
    step, or rewind to the last checkpoint. Such a step never changes the weights."""
    max_nonfinite_steps: int = 3
    """Non-finite steps that are skipped or rewound before the run stops anyway."""

    def __post_init__(self) -> None:
        check_fields(
            self,
            "optim.",
            lr=(self.lr > 0, "above 0"),
            num_epochs=(self.num_epochs >= 1, "at least 1"),
            cooldown_epochs=(self.cooldown_epochs >= 0, "at least 0"),
            warmup_epochs=(
                0 <= self.warmup_epochs <= self.num_epochs,
                "0 <= warmup_epochs <= num_epochs",
            ),
            num_accumulation=(self.num_accumulation >= 1, "at least 1"),
            label_smoothing=(0 <= self.label_smoothing < 1, "0 <= share < 1"),
            mixup=(self.mixup >= 0, "at least 0"),
            cutmix=(self.cutmix >= 0, "at least 0"),
            mix_switch=(0 <= self.mix_switch <= 1, "a probability"),
            ema_decay=(0 <= self.ema_decay < 1, "0 <= decay < 1"),
            max_nonfinite_steps=(self.max_nonfinite_steps >= 0, "at least 0"),
            weight_decay=(self.weight_decay >= 0, "at least 0"),
            clip_grad_norm=(self.clip_grad_norm >= 0, "at least 0"),
            warmup_lr=(self.warmup_lr >= 0, "at least 0"),
            min_lr=(self.min_lr >= 0, "at least 0"),
            betas=(min(self.betas) >= 0 and max(self.betas) < 1, "0 <= beta < 1"),
            eps=(self.eps > 0, "above 0"),
            momentum=(0 <= self.momentum < 1, "0 <= momentum < 1"),
            freeze_layers=(self.freeze_layers >= -1, "at least -1"),
            freeze=(_is_pattern(self.freeze), "a regular expression"),
            unfreeze_epoch=(
                0 <= self.unfreeze_epoch < self.total_epochs
                and (
                    bool(self.freeze_layers or self.freeze) or not self.unfreeze_epoch
                ),
                "an epoch before the last one, with freeze_layers or freeze",
            ),
            layer_decay=(0 < self.layer_decay <= 1, "0 < decay <= 1"),
            classifier_lr_scale=(self.classifier_lr_scale > 0, "above 0"),
        )

    @property
    def total_epochs(self) -> int:
        """Number of all epochs, the cool-down included."""
        return self.num_epochs + self.cooldown_epochs
