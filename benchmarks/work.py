"""Define every loader's work: images, threads and output."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

Loaded = tuple[Tensor, Tensor]
"""Images, float32 (B, 3, H, W), normalised, and labels, int64 (B,)."""
Batches = Generator[Loaded, None, None]
# Rounds of some seconds must not meet an epoch's end; see `Work.num_repeats`.
_IMAGES_PER_THREAD = 8192


@dataclass(frozen=True, kw_only=True)
class Work:
    """The work on one set of images, the same for all loaders.

    The training recipe of ImageNet: decode, random resized crop by antialiased bilinear
    resampling, flip, normalise by ImageNet's mean and deviation.
    """

    folder: Path
    """Contains the same images as `images/`, `shards/`, `mds/` and `tars/`."""
    num_images: int
    num_threads: int
    """Decoding threads, or worker processes where a loader has those; a DataLoader
    with 0 loads in this process."""
    batch_size: int = 64
    img_size: int = 224
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    hflip: float = 0.5
    rand_augment: bool = False
    device: str = "cpu"
    """Device of the batches."""

    @property
    def num_repeats(self) -> int:
        """Number of repeats of the images in what a loader takes for an epoch.

        Some loaders stop for seconds at an epoch's end. That is negligible on ImageNet,
        but would dominate the measurement on a thousand images.
        """
        return math.ceil(
            _IMAGES_PER_THREAD * max(self.num_threads, 1) / self.num_images
        )


@dataclass(frozen=True, kw_only=True)
class Loader:
    """A way of loading, and its requirements.

    `batches` yields batches indefinitely; closing it ends all threads and processes.
    """

    name: str
    batches: Callable[[Work], Batches]
    libraries: tuple[str, ...] = ()
    """Modules imported before the clock starts."""
    on_ray: bool = False


def to_device(images: Tensor, labels: Tensor, *, work: Work) -> Loaded:
    """Copy a batch to the work's device, without waiting for the copy."""
    device = torch.device(work.device)
    return (
        images.to(device, non_blocking=True),
        labels.to(device, torch.int64, non_blocking=True),
    )
