"""Build the optimiser, freeze parameters, compute the learning rate of every step.

What is frozen depends on the settings and the epoch alone, so that a resumed run needs
to know no more. What is never trained needs no gradients. What is trained from an epoch
on has them all along and loses them until then: data parallelism, sharding and compiled
graphs stay as they were built.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from dataclasses import dataclass
from typing import Any

import torch
from timm.models import group_parameters
from timm.optim import Muon as TimmMuon  # pyright: ignore
from timm.optim import (  # pyright: ignore
    param_groups_layer_decay,  # pyright: ignore
    param_groups_weight_decay,  # pyright: ignore
)
from torch import nn

from pipelines.config import Optim

FOUND_INF = "found_inf"
"""What the fused optimisers take from a gradient scaler: 1 leaves the step out."""
# The key that timm's optimisers and schedulers give such a factor, too.
_LR_SCALE = "lr_scale"


def build_optimizer(model: nn.Module, *, optim: Optim) -> torch.optim.Optimizer:
    """Build AdamW, SGD or Muon with the groups of parameters that the settings ask for.

    Without `decay_all`, biases and other one-dimensional parameters are not decayed.
    Layers have their own groups if the rate decays by layer, and the classifier has if
    its rate is scaled. Layers are those of timm's `group_matcher`.
    """
    groups = _groups(model, optim=optim)
    if optim.optimizer == "muon":
        return Muon(
            groups,
            lr=optim.lr,
            momentum=optim.momentum,
            betas=optim.betas,
            eps=optim.eps,
        )
    # Fused: one pass over the memory, and a step can be left out without asking the
    # device (pipelines.training.nonfinite).
    if optim.optimizer == "sgd":
        sgd = torch.optim.SGD(groups, lr=optim.lr, momentum=optim.momentum, fused=True)
        if optim.momentum:
            # Else the first step makes them, without values where it is left out.
            for group in sgd.param_groups:
                for parameter in group["params"]:
                    zeros = torch.zeros_like(parameter)
                    sgd.state[parameter]["momentum_buffer"] = zeros
        return sgd
    return torch.optim.AdamW(
        groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True
    )


class Muon(TimmMuon):
    """Muon (Jordan et al., 2024) with AdamW for what is no matrix, one optimizer.

    timm's instead of PyTorch's, which takes two-dimensional parameters alone and would
    need a second optimizer beside it. Its steps are as long as AdamW's (Liu et al.,
    2025), so that one learning rate is right for both.
    """

    def step(self, closure: Any = None) -> Any:
        """Take a step, unless it is flagged as bad."""
        # The fused optimisers read the flag on the device; here the host waits for it.
        if not getattr(self, FOUND_INF, 0):
            return super().step(closure)
        return None


def _groups(model: nn.Module, *, optim: Optim) -> list[dict[str, Any]]:
    decay = optim.weight_decay
    free = () if optim.decay_all else getattr(model, "no_weight_decay", tuple)()
    if optim.layer_decay < 1:
        groups = param_groups_layer_decay(
            model,
            weight_decay=decay,
            no_weight_decay_list=tuple(free),
            weight_decay_exclude_1d=not optim.decay_all,
            layer_decay=optim.layer_decay,
        )
    elif optim.decay_all:
        trained = [p for p in model.parameters() if p.requires_grad]
        groups: list[dict[str, Any]] = [{"params": trained, "weight_decay": decay}]
    else:
        groups = param_groups_weight_decay(
            model, weight_decay=decay, no_weight_decay_list=tuple(free)
        )
    scale, is_muon = optim.classifier_lr_scale, optim.optimizer == "muon"
    if scale == 1 and not is_muon:
        return groups
    own = {id(p) for layer in classifiers(model) for p in layer.parameters()}
    split = []
    for inside, factor in ((False, 1.0), (True, scale)):
        for group in groups:
            params = [p for p in group["params"] if (id(p) in own) == inside]
            factor_of_both = factor * group.get(_LR_SCALE, 1.0)
            made = {**group, "params": params, _LR_SCALE: factor_of_both}
            # A classifier's matrix has rows of classes: for it Muon's AdamW.
            split.append(made | {"use_fallback": True} if inside and is_muon else made)
    return [group for group in split if group["params"]]


def classifiers(model: nn.Module) -> tuple[nn.Module, ...]:
    """Return the linear layers that compute a timm model's logits, one or several."""
    find = getattr(model, "get_classifier", None)
    if find is None:
        raise ValueError(
            f"{type(model).__name__}: expected a timm model with get_classifier, got "
            "one without; leave --optim.classifier-lr-scale, --optim.freeze-layers -1, "
            "--optim.optimizer muon and --model.init-from"
        )
    found = find()
    return tuple(found) if isinstance(found, tuple | list) else (found,)


def learning_rate(step: int, *, optim: Optim, steps_per_epoch: int) -> float:
    """Compute the rate of a step: linear warm-up, then the schedule, then its end.

    The schedule's clock starts with the warm-up, as in timm, so the rate jumps a little
    where the warm-up ends. The papers step a cosine by epoch, we by step.
    """
    warmup_steps = round(optim.warmup_epochs * steps_per_epoch)
    if step < warmup_steps:
        return optim.warmup_lr + (optim.lr - optim.warmup_lr) * step / warmup_steps
    last = optim.num_epochs * steps_per_epoch
    kind = optim.schedule.kind
    if kind == "cosine":
        wave = 1 + math.cos(math.pi * min(step / last, 1.0))
        return optim.min_lr + (optim.lr - optim.min_lr) * wave / 2
    if kind == "linear":
        return optim.lr * (1 - min(step / last, 1.0))
    if kind == "piecewise":
        return _piecewise(step / steps_per_epoch, optim=optim)
    # A cool-down stays in the schedule's last epoch.
    return _by_epoch(min(step, last - 1) // steps_per_epoch, optim=optim)


def _by_epoch(epoch: int, *, optim: Optim) -> float:
    schedule = optim.schedule
    if schedule.kind == "step":
        return optim.lr * schedule.gamma ** bisect_right(schedule.milestones, epoch)
    if schedule.kind == "exponential":
        return optim.lr * schedule.gamma**epoch
    if schedule.kind == "polynomial":
        left = 1 - (epoch - 1) / (schedule.end_epoch - 1)
        return optim.lr * max(left, 0.0) ** schedule.power
    return optim.lr


def _piecewise(epoch: float, *, optim: Optim) -> float:
    """Interpolate between the milestones; the last value stays."""
    ends = (0.0, *optim.schedule.milestones)
    rates = (optim.lr, *optim.schedule.values)
    i = bisect_right(ends, epoch)
    if i == len(ends):
        return rates[-1]
    share = (epoch - ends[i - 1]) / (ends[i] - ends[i - 1])
    return rates[i - 1] + share * (rates[i] - rates[i - 1])


def current_learning_rate(optimizer: torch.optim.Optimizer) -> float:
    """Return the rate set last, without the factors of groups."""
    first = optimizer.param_groups[0]
    return first["lr"] / first.get(_LR_SCALE, 1.0)


def set_learning_rate(optimizer: torch.optim.Optimizer, *, lr: float) -> None:
    """Set the rate of all parameter groups, times each one's factor."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get(_LR_SCALE, 1.0)


@dataclass(frozen=True, kw_only=True)
class Frozen:
    """Names of parameters that are not trained, or not before an epoch."""

    names: frozenset[str] = frozenset()
    unfreeze_epoch: int = 0
    """0 is never."""

    def is_on(self, epoch: int) -> bool:
        """Whether they are frozen in an epoch, counted from 0."""
        return bool(self.names) and not 0 < self.unfreeze_epoch <= epoch

    def set_modes(self, model: nn.Module, *, epoch: int) -> None:
        """Put modules whose parameters are all frozen in evaluation mode.

        BatchNorm's statistics stay there, and nothing is dropped.
        """
        if not self.is_on(epoch):
            return
        # By names, and not once for all: sharding exchanges the parameters.
        frozen = {id(p) for name, p in model.named_parameters() if name in self.names}
        for module in model.modules():
            own = [id(parameter) for parameter in module.parameters()]
            if own and frozen.issuperset(own):
                module.eval()

    def drop_gradients(self, model: nn.Module, *, epoch: int) -> None:
        """Leave the optimiser nothing to do for what is trained later."""
        if self.unfreeze_epoch and self.is_on(epoch):
            for name, parameter in model.named_parameters():
                if name in self.names:
                    parameter.grad = None


def freeze(model: nn.Module, *, optim: Optim) -> Frozen:
    """Freeze what the settings say; before anything wraps or shards the model.

    Raises ValueError where they name no parameter, or leave none to train.
    """
    names = [name for name, _ in model.named_parameters()]
    frozen = _lowest_layers(model, num_layers=optim.freeze_layers)
    if optim.freeze:
        matched = {name for name in names if re.search(optim.freeze, name)}
        if not matched:
            raise ValueError(
                f"optim.freeze: expected a pattern of names such as {names[0]} and "
                f"{names[-1]}, got {optim.freeze!r}, which matches none"
            )
        frozen |= matched
    if len(frozen) == len(names):
        raise ValueError(
            "expected a parameter to train, got --optim.freeze-layers "
            f"{optim.freeze_layers} and --optim.freeze {optim.freeze!r}, which freeze "
            "all; freeze less"
        )
    if not optim.unfreeze_epoch:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name not in frozen and parameter.requires_grad)
    return Frozen(names=frozenset(frozen), unfreeze_epoch=optim.unfreeze_epoch)


def _lowest_layers(model: Any, *, num_layers: int) -> set[str]:
    """Name the parameters of the lowest layers; -1 is all but the classifier's."""
    named = list(model.named_parameters())
    if num_layers < 0:
        own = {id(p) for layer in classifiers(model) for p in layer.parameters()}
        return {name for name, parameter in named if id(parameter) not in own}
    if not num_layers:
        return set()
    if not hasattr(model, "group_matcher"):
        raise ValueError(
            "optim.freeze_layers: expected a model of timm with group_matcher, got "
            f"{type(model).__name__}; set --optim.freeze"
        )
    matcher = model.group_matcher(coarse=False)
    layers: Any = group_parameters(model, matcher, reverse=True)
    return {name for name, _ in named if layers[name] < num_layers}
