"""Which of a trunk's features are positions of the image: inferred from shapes.

The positions are a grid as the image is: that tells maps with channels first from those
with channels last, and class tokens from positions, whatever a model declares.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

_PREFIX_TOKEN = re.compile(r"(^|[._])(cls|class|dist|reg)(tr)?_?tok(en)?s?(_?\d+)?$")
_CLASS_TOKEN = re.compile(r"(^|[._])(cls|class)_?tok(en)?s?(_?\d+)?$")


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How features of shape (B, N, C), (B, C, H, W) or (B, H, W, C) are read."""

    channels_last: bool
    num_tokens: int
    """Positions of the image: those that are pooled."""
    num_prefix_tokens: int = 0
    has_class_token: bool = False


def read_layout(
    model: nn.Module, *, shape: tuple[int, ...], image: tuple[int, int]
) -> Layout:
    """Read the layout of a model's features of some shape, for images (H, W).

    Raises ValueError where there is no position, and where two readings are possible.
    """
    if len(shape) == 4:
        return _read_map(model, shape=shape, image=image)
    return _read_tokens(model, shape=shape, image=image)


def _read_map(
    model: nn.Module, *, shape: tuple[int, ...], image: tuple[int, int]
) -> Layout:
    fmt = getattr(model, "output_fmt", None)
    width = getattr(model, "num_features", None)
    channels_first, channels_last = (shape[2], shape[3]), (shape[1], shape[2])
    best = max(_rank(*sides, image=image) for sides in (channels_first, channels_last))
    first = _rank(*channels_first, image=image) == best
    last = _rank(*channels_last, image=image) == best
    if first == last and fmt in ("NCHW", "NHWC"):
        first, last = fmt == "NCHW", fmt == "NHWC"
    elif first == last and shape[1] != shape[3]:
        first, last = shape[1] == width, shape[3] == width
    if first == last:
        raise ValueError(
            "expected a map (B, C, H, W) or (B, H, W, C) whose positions are a grid as "
            f"the image is, got {tuple(shape)} for images {image} from {_name(model)}; "
            "set model.output_fmt to 'NCHW' or 'NHWC', or choose another backbone"
        )
    height, width = channels_last if last else channels_first
    return Layout(channels_last=last, num_tokens=height * width)


def _read_tokens(
    model: nn.Module, *, shape: tuple[int, ...], image: tuple[int, int]
) -> Layout:
    num, declared = shape[1], getattr(model, "num_prefix_tokens", None)
    learned = _prefix_tokens(model)
    counts = {sum(learned.values()), *learned.values()}
    counts = counts if declared is None else {int(declared)}
    if num in counts:
        raise ValueError(
            f"expected tokens of the image's positions, got {num} from "
            f"{_name(model)}.forward_features, as many as it has class tokens: the "
            "covariance of these does not depend on the image; choose another backbone"
        )
    ranks = {n: _rank_of(num - n, image=image) for n in counts | {0}}
    fits = [n for n, rank in ranks.items() if 0 < rank == max(ranks.values())]
    if declared in fits:
        # Few tokens may be a grid with the prefix and without: what is declared goes.
        fits = [declared]
    if len(fits) != 1:
        expected = " or ".join(f"{n}" for n in sorted(counts | {0}))
        raise ValueError(
            f"expected tokens (B, N, C) of a grid as the image is, after {expected} "
            f"class tokens, got {tuple(shape)} for images {image} from {_name(model)}; "
            "set model.num_prefix_tokens, or choose another backbone"
        )
    (prefix,) = fits
    if prefix and declared is None:
        _check_prefix(model, shape=shape, num_prefix_tokens=prefix)
    return Layout(
        channels_last=True,
        num_tokens=num - prefix,
        num_prefix_tokens=prefix,
        has_class_token=bool(prefix) and _has_class_token(model, names=learned),
    )


def _has_class_token(model: nn.Module, *, names: dict[str, int]) -> bool:
    said = getattr(model, "has_class_token", None)
    if said is not None:
        return bool(said)
    return not names or any(_CLASS_TOKEN.search(name) for name in names)


def _prefix_tokens(model: nn.Module) -> dict[str, int]:
    """Return the number of tokens in each parameter of class or register tokens."""
    return {
        name: param.shape[-2]
        for name, param in model.named_parameters()
        if _PREFIX_TOKEN.search(name) and param.ndim >= 2
    }


def _check_prefix(
    model: nn.Module, *, shape: tuple[int, ...], num_prefix_tokens: int
) -> None:
    """Reject a model that doesn't declare its class token and has it elsewhere.

    Its own head shows that: it classifies by the class token, or by the positions.
    """
    used = tokens_of_the_head(model, shape=shape)
    if used is None:
        return
    prefix = set(range(num_prefix_tokens))
    if not (used <= prefix or used >= set(range(shape[1])) - prefix):
        raise ValueError(
            f"expected the class token first, got {_name(model)}, whose own head "
            f"classifies by the tokens {sorted(used)[:4]} of {shape[1]}; put it first "
            "and set model.num_prefix_tokens, or choose another backbone"
        )


def tokens_of_the_head(model: Any, *, shape: tuple[int, ...]) -> set[int] | None:
    """Find the tokens that a model's own head classifies by; None where it can't run.

    The head is run on random numbers, which costs nothing beside the trunk.
    """
    if not hasattr(model, "forward_head"):
        return None
    param = next(model.parameters())
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(1, *shape[1:], generator=generator).to(param)
    modes = {module: module.training for module in model.modules()}
    try:
        with torch.enable_grad():
            tokens.requires_grad_()
            out = model.eval().forward_head(tokens)
            (grad,) = torch.autograd.grad(out.square().sum(), tokens)
    except Exception:  # Whatever a head raises: it is asked only where it can answer.
        return None
    finally:
        for module, mode in modes.items():
            module.training = mode
    if grad.device.type == "meta":
        return None
    return set(grad[0].abs().amax(-1).nonzero().flatten().tolist())


def _name(model: nn.Module) -> str:
    return type(model).__name__


def _rank_of(num: int, *, image: tuple[int, int]) -> int:
    """Rank the likeliest grid of `num` tokens; see `_rank`."""
    heights = (h for h in range(1, min(num, image[0]) + 1) if num % h == 0)
    ranks = (_rank(h, num // h, image=image, margin=0) for h in heights)
    return max(ranks, default=0)


def _rank(height: int, width: int, *, image: tuple[int, int], margin: int = 1) -> int:
    """Rank how likely a grid is of an image's patches, all square and of one size.

    3: they fill it. 2: of some stride, rounded down on both sides or up. 1: up to so
    many rows at the margin, which unpadded convolutions leave out. 0: not at all.
    """
    if not (1 <= height <= image[0] and 1 <= width <= image[1]):
        return 0
    if image[0] * width == image[1] * height and image[0] % height == 0:
        return 3
    if _has_stride(height, width, image=image):
        return 2
    near = ((height + more, width + margin - more) for more in range(margin + 1))
    return int(any(_has_stride(h, w, image=image) for h, w in near))


def _has_stride(height: int, width: int, *, image: tuple[int, int]) -> bool:
    sides = ((image[0], height), (image[1], width))
    down = max(x / (n + 1) for x, n in sides) < min(x / n for x, n in sides)
    above = min(x / (n - 1) if n > 1 else float("inf") for x, n in sides)
    return down or max(x / n for x, n in sides) < above
