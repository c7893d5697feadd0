"""Build the optimiser and give the learning rate of every step."""

from __future__ import annotations

import math

import torch
from timm.optim import param_groups_weight_decay  # pyright: ignore
from torch import nn

from pipelines.config import Optim


def build_optimizer(model: nn.Module, *, optim: Optim) -> torch.optim.AdamW:
    """Build AdamW; parameters of one dimension and biases are not decayed."""
    no_decay = getattr(model, "no_weight_decay", tuple)()
    groups = param_groups_weight_decay(
        model, weight_decay=optim.weight_decay, no_weight_decay_list=tuple(no_decay)
    )
    return torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps)


def learning_rate(step: int, *, optim: Optim, steps_per_epoch: int) -> float:
    """Give the rate of a step: linear warm-up, then cosine to min_lr, then min_lr.

    The cosine's clock starts with the warm-up, as in timm, so the rate jumps a little
    where the warm-up ends. The papers step it by epoch, we by step.
    """
    warmup_steps = round(optim.warmup_epochs * steps_per_epoch)
    if step < warmup_steps:
        return optim.warmup_lr + (optim.lr - optim.warmup_lr) * step / warmup_steps
    done = min(step / (optim.num_epochs * steps_per_epoch), 1.0)
    return optim.min_lr + (optim.lr - optim.min_lr) * (1 + math.cos(math.pi * done)) / 2


def set_learning_rate(optimizer: torch.optim.Optimizer, *, lr: float) -> None:
    """Set the rate of all parameter groups."""
    for group in optimizer.param_groups:
        group["lr"] = lr
