"""Change a timm backbone into a trunk: features for a second-order head, no more.

These change the model they are given, in place.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from timm.models import VGG, ResNet
from torch import nn
from torch.func import functional_call

from sovit.attention import stages_of
from sovit.shapes import Tensor
from sovit.tokens import TOKEN_STRIDES, ConvEmbed

MIN_SIZE = 32


def check_conv_size(img_size: int | tuple[int, int]) -> tuple[int, int]:
    """Return (height, width) of images for a convolutional trunk, or raise ValueError.

    Such a trunk takes any size of at least 32 and is built the same for all.
    """
    size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
    if len(size) != 2 or min(size) < MIN_SIZE:
        raise ValueError(
            f"img_size must be at least {MIN_SIZE}, or a pair (height, width) of such, "
            f"got {img_size}: resize the images, for example to 224."
        )
    return size[0], size[1]


def unstride_last_stage(model: nn.Module) -> None:
    """Keep the last stage's map as large as the stage's before: 14x14 for 224x224.

    The papers of covariance pooling do so, for four times as many positions. A ResNet's
    last stage loses its stride and is not dilated; a VGG loses its last pooling. Raises
    ValueError for other networks.
    """
    if isinstance(model, ResNet):
        _unstride(cast(nn.Module, stages_of(model)[-1][0]))
    elif isinstance(model, VGG):
        model.features = model.features[:-1]
    else:
        raise ValueError(
            "drop_last_stride=True needs a ResNet or a VGG of timm, got "
            f"{type(model).__name__}: build it with drop_last_stride=False, or take "
            "the stride out yourself and pass the model."
        )
    before, last = model.feature_info[-2:]
    last["reduction"] = before["reduction"]


def _unstride(block: nn.Module) -> None:
    for parent in list(block.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Conv2d):
                child.stride = (1, 1)
            elif isinstance(child, nn.AvgPool2d) or name == "aa":
                setattr(parent, name, nn.Identity())
    block.stride = 1  # pyright: ignore[reportArgumentType]


def embed_by_convolutions(model: nn.Module, *, kind: str) -> None:
    """Give a ViT, DeiT or Swin So-ViT's embedding instead of the linear one.

    Norm and positions of the backbone stay. Raises ValueError for models without
    patches.
    """
    patch_embed = getattr(model, "patch_embed", None)
    proj = getattr(patch_embed, "proj", None)
    if not isinstance(proj, nn.Conv2d):
        raise ValueError(
            "token_embed needs a backbone with patches (patch_embed.proj), got "
            f"{type(model).__name__}: leave token_embed out."
        )
    if kind != "resnet" and kind != "densenet":
        raise ValueError(
            f"token_embed must be 'resnet', 'densenet' or None, got {kind!r}: None "
            "keeps the backbone's own embedding."
        )
    if proj.stride[0] not in TOKEN_STRIDES:
        raise ValueError(
            f"token_embed makes a token of so many pixels a side: {TOKEN_STRIDES}, got "
            f"{type(model).__name__} with patches of {proj.stride[0]}: choose another "
            "backbone, or its patch_size."
        )
    patches = ConvEmbed(
        proj.out_channels,
        kind=kind,
        in_chans=proj.in_channels,
        token_stride=proj.stride[0],
        flatten=False,
    )
    model.set_submodule("patch_embed.proj", patches.to(proj.weight))


@dataclass(frozen=True, kw_only=True)
class Features:
    """Say what `forward_features` of a model returns."""

    embed_dim: int
    channels_last: bool
    """Whether channels are the last dimension: of tokens, and of Swin's maps."""
    num_prefix_tokens: int = 0
    has_class_token: bool = False
    unused: tuple[str, ...] = ()
    """Parameters that the features do not depend on: the model's own head."""


class _Features(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Any:
        return self.model.forward_features(x)  # pyright: ignore[reportCallIssue]


def image_shape(
    model: nn.Module, *, img_size: tuple[int, int] | None = None
) -> tuple[int, int, int]:
    """Return the shape (channels, height, width) of a model's images.

    Without `img_size` it is what the patch embedding or timm's configuration says.
    """
    config = getattr(model, "pretrained_cfg", {}) or {}
    embedded = getattr(getattr(model, "patch_embed", None), "img_size", None)
    usual = config.get("input_size", (3, 224, 224))[-2:]
    height, width = img_size or embedded or usual
    convs = (m for m in model.modules() if isinstance(m, nn.Conv2d))
    first = next(convs, None)
    return 3 if first is None else first.in_channels, height, width


def inspect_features(
    model: nn.Module, *, img_size: tuple[int, int] | None = None
) -> Features:
    """Find what `forward_features` returns, by shapes alone: nothing is computed.

    Raises ValueError where that is not one map or sequence of tokens.
    """
    params = dict(model.named_parameters())
    state = {
        f"model.{name}": torch.empty_like(tensor, device="meta")
        for name, tensor in (*params.items(), *model.named_buffers())
    }
    leaves = [state[f"model.{name}"].requires_grad_() for name in params]
    with torch.enable_grad():
        image = torch.zeros(2, *image_shape(model, img_size=img_size), device="meta")
        image = image.to(next(iter(params.values())).dtype)
        out = functional_call(_Features(model), state, (image,))
        if not isinstance(out, Tensor) or out.ndim not in (3, 4):
            raise ValueError(
                "backbone.forward_features must return tokens (B, N, C) or a map "
                f"(B, C, H, W), {type(model).__name__} gives "
                f"{tuple(out.shape) if isinstance(out, Tensor) else type(out)}: choose "
                "another backbone."
            )
        grads = torch.autograd.grad(out.sum(), leaves, allow_unused=True)
    tokens = out.ndim == 3
    last = tokens or getattr(model, "output_fmt", "NCHW") == "NHWC"
    prefix = int(getattr(model, "num_prefix_tokens", 0)) if tokens else 0
    return Features(
        embed_dim=out.shape[-1 if last else 1],
        channels_last=last,
        num_prefix_tokens=prefix,
        has_class_token=bool(prefix and getattr(model, "has_class_token", True)),
        unused=tuple(n for n, grad in zip(params, grads, strict=True) if grad is None),
    )


def strip(model: nn.Module, *, unused: tuple[str, ...]) -> None:
    """Take out the layers that the features do not need: no parameter lies idle.

    The largest layer goes of which nothing is used. A single parameter beside used ones
    stays, frozen.
    """
    idle, gone = set(unused), set[str]()
    for name in unused:
        parts = name.split(".")
        above = [".".join(parts[:i]) for i in range(1, len(parts))]
        if gone.intersection(above):
            continue
        layer = next((a for a in above if _names(model, below=a) <= idle), None)
        if layer is None:
            model.get_parameter(name).requires_grad_(False)
        else:
            model.set_submodule(layer, nn.Identity())
            gone.add(layer)


def _names(model: nn.Module, *, below: str) -> set[str]:
    layer = model.get_submodule(below)
    return {f"{below}.{name}" for name, _ in layer.named_parameters()}
