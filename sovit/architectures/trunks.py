"""Reduce a timm backbone to a trunk: features for a second-order head, no more.

These functions modify the given model in place.
"""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from timm.models import VGG, ResNet
from torch import nn
from torch.overrides import TorchFunctionMode

from sovit.architectures.layouts import read_layout
from sovit.architectures.tokens import TOKEN_STRIDES, ConvEmbed
from sovit.attention import stages_of
from sovit.shapes import Tensor

MIN_SIZE = 32


def placed(device: torch.device | str | None) -> AbstractContextManager[Any]:
    """Build modules on a device in this context; None leaves it to the caller."""
    return nullcontext() if device is None else torch.device(device)


def check_conv_size(img_size: int | tuple[int, int]) -> tuple[int, int]:
    """Return (height, width) of images for a convolutional trunk, or raise ValueError.

    Such a trunk takes any size of at least 32 and is built the same for all.
    """
    size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
    if len(size) != 2 or min(size) < MIN_SIZE:
        raise ValueError(
            f"img_size: expected at least {MIN_SIZE}, or a pair (height, width) of "
            f"such, got {img_size}; resize the images, for example to 224"
        )
    return size[0], size[1]


def unstride_last_stage(model: nn.Module) -> None:
    """Keep the last stage's map as large as the one before: 14x14 for 224x224.

    The papers of covariance pooling do so, for four times as many positions. A ResNet's
    last stage loses its stride and is not dilated; a VGG loses its last pooling. Raises
    ValueError for other networks.
    """
    if isinstance(model, ResNet):
        _unstride(cast(nn.Module, stages_of(model)[-1][0]))
    elif isinstance(model, VGG):
        model.features = model.features[:-1]
        # What is left at the end has an entry of its own among the features.
        for entries in (model.feature_info, getattr(model, "feature_ends", [])):
            del entries[-1:]
        return
    else:
        raise ValueError(
            "drop_last_stride=True: expected a ResNet or a VGG of timm, got "
            f"{type(model).__name__}; build it with drop_last_stride=False, or take "
            "the stride out yourself and pass the model"
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
    """Replace the linear embedding of a ViT, DeiT or Swin by So-ViT's.

    Norm and positions of the backbone stay. Raises ValueError for models without
    patches.
    """
    patch_embed = getattr(model, "patch_embed", None)
    proj = getattr(patch_embed, "proj", None)
    if not isinstance(proj, nn.Conv2d):
        raise ValueError(
            "token_embed: expected a backbone with patches (patch_embed.proj), got "
            f"{type(model).__name__}; leave token_embed out"
        )
    if kind != "resnet" and kind != "densenet":
        raise ValueError(
            f"token_embed: expected 'resnet', 'densenet' or None, got {kind!r}; None "
            "keeps the backbone's own embedding"
        )
    if proj.stride[0] not in TOKEN_STRIDES:
        raise ValueError(
            f"token_embed: expected patches of one of {TOKEN_STRIDES} pixels a side, "
            f"got {type(model).__name__} with patches of {proj.stride[0]}; choose "
            "another backbone, or its patch_size"
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
    """What `forward_features` of a model returns, and which parameters that needs."""

    embed_dim: int
    channels_last: bool
    """Whether channels are the last dimension: of tokens, and of Swin's maps."""
    num_tokens: int
    """Positions of the image, of the size that was looked at."""
    num_prefix_tokens: int = 0
    has_class_token: bool = False
    unused: tuple[str, ...] = ()
    """Parameters that the features do not depend on: the model's own head."""
    detached: tuple[str, ...] = ()
    """Parameters that the features do depend on and that get no gradient."""


class _Seen(TorchFunctionMode):
    """Mode that records the tensors from which torch's functions compute."""

    def __init__(self) -> None:
        super().__init__()
        self.ids = set[int]()

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if _tensors(out):  # Not where a shape or a dtype was asked for.
            self.ids.update(id(tensor) for tensor in _tensors((args, kwargs)))
        return out


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value
    nested = parts if isinstance(value, list | tuple | dict) else ()
    return [tensor for part in nested for tensor in _tensors(part)]


def image_shape(
    model: nn.Module, *, img_size: tuple[int, int] | None = None
) -> tuple[int, int, int]:
    """Return the shape (channels, height, width) of a model's images.

    Channels are those that the model says it takes, else its first convolution. Without
    `img_size` the sides are what it was built for, or timm's configuration says.
    """
    config = getattr(model, "pretrained_cfg", {}) or {}
    built = getattr(model, "_model_args", {})  # As timm's create_model was called.
    convs = (m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d))
    usual = config.get("input_size") or (next(convs, 3), 224, 224)
    channels = getattr(model, "in_chans", None) or built.get("in_chans") or usual[0]
    height, width = img_size or built_size(model) or usual[1:]
    return channels, height, width


def built_size(model: nn.Module) -> tuple[int, int] | None:
    """Return the height and width of images that a model is fixed to, or None."""
    embedded = getattr(getattr(model, "patch_embed", None), "img_size", None)
    return embedded or _pair(getattr(model, "_model_args", {}).get("img_size"))


def _pair(size: Any) -> tuple[int, int] | None:
    return (size, size) if isinstance(size, int) else size


def inspect_features(
    model: nn.Module, *, img_size: tuple[int, int] | None = None
) -> Features:
    """Infer what `forward_features` returns, on the meta device.

    Raises ValueError where that is not one map or sequence of tokens of the image's
    positions, and where image or most of the weights get no gradient through them.
    """
    sketch = _on_meta(model)
    params = {n: p for n, p in sketch.named_parameters() if p.requires_grad}
    leaves = list(params.values())
    shape = image_shape(model, img_size=img_size)
    image = torch.zeros(2, *shape, device="meta")
    if leaves:
        image = image.to(leaves[0].dtype)
    image.requires_grad_()
    with torch.enable_grad(), _Seen() as seen:
        out = _run(sketch, image=image)
    layout = read_layout(model, shape=tuple(out.shape), image=shape[1:])
    by_image, *grads = _gradients(out, image, *leaves)
    idle = [n for n, grad in zip(params, grads, strict=True) if grad is None]
    detached = tuple(name for name in idle if id(params[name]) in seen.ids)
    trained = sum(p.numel() for name, p in params.items() if name not in idle)
    lost = sum(params[name].numel() for name in detached)
    if by_image is None or lost > trained:
        what = "the image" if by_image is None else "most of the weights in use"
        raise ValueError(
            "expected features with a gradient to the image and the trunk, got "
            f"{type(model).__name__}.forward_features without one to {what} ({trained} "
            f"weights get one, {lost} do not); take out no_grad and detach, or choose "
            "another backbone"
        )
    return Features(
        embed_dim=out.shape[-1 if layout.channels_last else 1],
        channels_last=layout.channels_last,
        num_tokens=layout.num_tokens,
        num_prefix_tokens=layout.num_prefix_tokens,
        has_class_token=layout.has_class_token,
        unused=tuple(name for name in idle if name not in detached),
        detached=detached,
    )


def check_trunk(model: Any) -> None:
    """Raise ValueError for anything but a classification model of timm's kind."""
    if callable(getattr(model, "forward_features", None)):
        return
    kind = type(model)
    what = f"{kind.__module__}.{kind.__qualname__}"
    if hasattr(model, "feature_info"):
        what += ", as features_only=True makes"
    raise ValueError(
        "backbone: expected a timm model with forward_features, or the name of one, "
        f"got {what}; build it by timm.create_model(name), without features_only, or "
        "add a method forward_features that returns tokens (B, N, C) or a map (B, C, "
        "H, W)"
    )


def _on_meta(model: nn.Module) -> nn.Module:
    """Copy a model to the meta device, so that a call leaves no state in it."""
    memo: dict[int, Any] = {}
    for param in model.parameters():
        empty = torch.empty_like(param, device="meta")
        memo[id(param)] = nn.Parameter(empty, requires_grad=empty.is_floating_point())
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(model, memo)


def _run(model: Any, *, image: Tensor) -> Tensor:
    """Return the features of an image, which must be one tensor."""
    name = type(model).__name__
    try:
        # A copy, since some models change the image that they are given in place.
        out = model.forward_features(image.clone())
    except Exception as error:  # Whatever foreign code raises for images it can't take.
        said = " ".join(str(error).split())[:200]
        raise ValueError(
            f"expected a backbone that takes images {tuple(image.shape[1:])}, got "
            f"{type(error).__name__} from {name}.forward_features ({said}); set "
            "img_size to the size that it takes, or choose another backbone"
        ) from error
    if not isinstance(out, Tensor) or out.ndim not in (3, 4):
        got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise ValueError(
            "backbone.forward_features must return tokens (B, N, C) or a map "
            f"(B, C, H, W), {name} gives {got}: choose another backbone."
        )
    return out


def _gradients(out: Tensor, *leaves: Tensor) -> tuple[Tensor | None, ...]:
    if not out.requires_grad:
        return (None,) * len(leaves)
    return torch.autograd.grad(out.sum(), leaves, allow_unused=True)


def strip(
    model: nn.Module, *, unused: tuple[str, ...], detached: tuple[str, ...] = ()
) -> None:
    """Remove the layers that the features do not need: no parameter lies idle.

    The largest wholly unused layer is removed. A single parameter beside used ones
    stays, frozen, and so does what the features need but gets no gradient.
    """
    idle, gone = set(unused), set[str]()
    for name in (*unused, *detached):
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
