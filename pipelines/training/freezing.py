"""Freeze parts of a model: which parameters are not trained, and until when.

What is frozen depends on the settings and the epoch alone, so that a resumed run needs
to know no more. What is never trained needs no gradients. What is trained from an epoch
on has them all along and loses them until then: data parallelism, sharding and compiled
graphs stay as they were built.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from timm.models import group_parameters
from torch import nn

from pipelines.config import Optim
from pipelines.training.optimizer import classifiers


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
    frozen = _by_depth(model, num_layers=optim.freeze_layers)
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


def _by_depth(model: Any, *, num_layers: int) -> set[str]:
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
