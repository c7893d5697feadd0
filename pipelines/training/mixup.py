"""Mix images and labels of a batch: label smoothing, mixup, cutmix."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from pipelines.config import Optim

Draw = tuple[float, tuple[float, float] | None]
"""Share of the image itself in the mix, and the centre of cutmix's box as shares of
height and width; None for mixup."""


def draw_mix(optim: Optim, *, key: int) -> Draw | None:
    """Draw how to mix a batch, from a key; None where mixup and cutmix are off.

    Follows timm's batch mode, mixing every batch: one share and one box per batch, the
    same for all workers of a step.
    """
    if not optim.mixup and not optim.cutmix:
        return None
    source = random.Random(key)
    use_cutmix = optim.cutmix > 0 and (
        not optim.mixup or source.random() < optim.mix_switch
    )
    alpha = optim.cutmix if use_cutmix else optim.mixup
    lam = source.betavariate(alpha, alpha)
    box = (source.random(), source.random()) if use_cutmix else None
    return lam, box


def mix(images: Tensor, targets: Tensor, *, draw: Draw) -> tuple[Tensor, Tensor]:
    """Mix each image with its mirror position in the batch: first with last, and so on.

    mixup (Zhang et al., 2018), cutmix (Yun et al., 2019); timm's pairing.

    Args:
        images: (B, C, H, W).
        targets: (B, K), rows of distributions.
    """
    lam, center = draw
    if center is None:
        mixed = torch.lerp(images.flip(0), images, lam)
    else:
        top, bottom, left, right = _box(images.shape[2:], lam=lam, center=center)
        mixed = images.clone()
        mixed[:, :, top:bottom, left:right] = images.flip(0)[
            :, :, top:bottom, left:right
        ]
        height, width = images.shape[2:]
        lam = 1 - (bottom - top) * (right - left) / (height * width)
    return mixed, torch.lerp(targets.flip(0), targets, lam)


def _box(
    size: torch.Size, *, lam: float, center: tuple[float, float]
) -> tuple[int, int, int, int]:
    """Return the edges of cutmix's box, clipped to the image."""
    edges = []
    for length, at in zip(size, center, strict=True):
        cut = int(length * (1 - lam) ** 0.5)
        middle = int(at * length)
        edges += [max(middle - cut // 2, 0), min(middle + (cut + 1) // 2, length)]
    return edges[0], edges[1], edges[2], edges[3]
