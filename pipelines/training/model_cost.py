"""Count a model's parameters and multiply-adds, on the meta device."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from pipelines.config import Model, Optim
from pipelines.training.freezing import freeze
from pipelines.training.model import build_model, without_weights
from pipelines.training.state import checkpoint_gradients

Shape = Sequence[int]
# Of BatchNorm one image makes no batch.
_NUM_TRAINED = 2


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """Parameter counts of a model."""

    num: int
    num_trained: int
    groups: Mapping[str, int]
    """By the model's first level: modules, and parameters in none. A trunk under our
    head by its own first level."""
    num_bytes: int
    """Of all parameters."""
    num_trained_bytes: int
    num_buffer_bytes: int


def shapes_of(
    settings: Model,
    *,
    num_classes: int,
    grad_checkpointing: bool = False,
    optim: Optim | None = None,
) -> nn.Module:
    """Build a model on the meta device; no weights are loaded.

    Args:
        optim: Says what is frozen; by default nothing is.

    Raises ValueError where it can't be built, or can't checkpoint its activations.
    """
    with torch.device("meta"):
        model = build_model(without_weights(settings), num_classes=num_classes)
    if grad_checkpointing:
        checkpoint_gradients(model, name=settings.name)
    if optim is not None:
        freeze(model, optim=optim)
    return model


def count_parameters(model: nn.Module) -> Parameters:
    """Count a model's parameters, shared ones once."""
    groups: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        group = _group(name)
        groups[group] = groups.get(group, 0) + parameter.numel()
    trained = [p for p in model.parameters() if p.requires_grad]
    return Parameters(
        num=sum(groups.values()),
        num_trained=sum(p.numel() for p in trained),
        groups=groups,
        num_bytes=sum(p.nbytes for p in model.parameters()),
        num_trained_bytes=sum(p.nbytes for p in trained),
        num_buffer_bytes=sum(b.nbytes for b in model.buffers()),
    )


def _group(name: str) -> str:
    first, *rest = name.split(".")
    # Ours hold another model's trunk as a whole.
    return f"{first}.{rest[0]}" if first == "backbone" and rest else first


def count_macs(model: nn.Module, *, img_size: int) -> int:
    """Count the multiply-adds of one image through a meta model in evaluation.

    Counted are products of matrices and vectors, and convolutions, as the code runs
    them. Eigenvalues and element-wise operations are not.
    """
    model.eval()
    with _counting() as counter, torch.no_grad():
        model(_images(1, img_size=img_size))
    return counter.get_total_flops() // 2


def count_training_macs(model: nn.Module, *, img_size: int) -> int:
    """Count the multiply-adds of one image in training: forward and backward.

    Recomputation of checkpointed activations counts again.
    """
    model.train()
    with _counting() as counter:
        model(_images(_NUM_TRAINED, img_size=img_size)).sum().backward()
    model.zero_grad(set_to_none=True)
    return counter.get_total_flops() // 2 // _NUM_TRAINED


def _images(num_images: int, *, img_size: int) -> torch.Tensor:
    return torch.zeros(num_images, 3, img_size, img_size, device="meta")


def _counting() -> FlopCounterMode:
    return FlopCounterMode(display=False, custom_mapping=dict(_FORMULAS))


def _mv(matrix: Shape, vector: Shape, *args: Any, **kwargs: Any) -> int:
    return 2 * math.prod(matrix)


def _dot(left: Shape, right: Shape, *args: Any, **kwargs: Any) -> int:
    return 2 * math.prod(left)


def _batches(left: Shape, right: Shape, *args: Any, **kwargs: Any) -> int:
    return 2 * math.prod(left) * right[-1]


def _added(formula: Callable[..., int]) -> Callable[..., int]:
    """Return the formula of a product for the same product plus an addend."""

    def count(added: Shape, *args: Any, **kwargs: Any) -> int:
        return formula(*args, **kwargs)

    return count


def _convolution_backward(
    grad: Shape,
    images: Shape,
    weight: Shape,
    bias: object,
    stride: object,
    padding: object,
    dilation: object,
    transposed: bool,
    output_padding: object,
    groups: int,
    wanted: Sequence[bool],
    **kwargs: Any,
) -> int:
    """Count a forward pass each for the gradients of images and weights.

    The counter's own formula treats each group as a product of all channels.
    """
    forward = conv_flop_count(list(images), list(weight), list(grad), transposed)
    return forward * sum(wanted[:2])


# What PyTorch's counter has no formula for, or a wrong one.
_FORMULAS: Mapping[Any, Callable[..., int]] = MappingProxyType(
    {
        torch.ops.aten.mv: _mv,
        torch.ops.aten.addmv: _added(_mv),
        torch.ops.aten.dot: _dot,
        torch.ops.aten.vdot: _dot,
        torch.ops.aten.addbmm: _added(_batches),
        torch.ops.aten.convolution_backward: _convolution_backward,
    }
)
