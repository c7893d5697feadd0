"""Check a loader's batches, so that no rate is for less work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.sets import labelled_images
from benchmarks.transforms import Transform
from benchmarks.work import Loaded, Work

_NUM_IMAGES = 256
# Crops are random and policies of RandAugment differ; pixels that are not normalised,
# or are by other numbers, are further off than this.
_TOLERANCE = 0.4


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Mean and standard deviation of normalised pixels."""

    mean: float
    std: float


def reference_moments(work: Work) -> Moments:
    """Compute reference moments of some images, decoded with torchvision."""
    samples = list(labelled_images(work.folder / "images"))[:_NUM_IMAGES]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transform = Transform(work, pixels="tensor", policy="torchvision")
        images = transform.stack([path.read_bytes() for path, _ in samples])
    return moments(images)


def moments(images: Tensor) -> Moments:
    """Compute the moments over all pixels and channels."""
    return Moments(mean=images.mean().item(), std=images.std().item())


def check_batches(batches: Sequence[Loaded], *, work: Work, reference: Moments) -> None:
    """Raise ValueError if batches are not what the work asks for.

    Args:
        batches: At least two in a row.
    """
    shape = (work.batch_size, 3, work.img_size, work.img_size)
    expected = (torch.float32, shape, work.device, torch.int64, shape[:1])
    for images, labels in batches:
        of_images = (images.dtype, tuple(images.shape), images.device.type)
        got = (*of_images, labels.dtype, tuple(labels.shape))
        if got != expected:
            raise ValueError(f"expected images and labels {expected}, got {got}")
    found = moments(torch.cat([images for images, _ in batches]))
    off = max(abs(found.mean - reference.mean), abs(found.std - reference.std))
    if not off <= _TOLERANCE:
        raise ValueError(f"expected pixels like {reference}, got {found}")
    means = torch.cat([images.mean(dim=(2, 3)) for images, _ in batches])
    if len(means.unique(dim=0)) < len(means):
        raise ValueError("expected images that all differ, got some twice")
