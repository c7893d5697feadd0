"""Define every loader's work, and do it with torchvision, as most rivals do."""

from __future__ import annotations

import io
import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import v2

from pipelines.config import IMAGENET_MEAN, IMAGENET_STD

Loaded = tuple[Tensor, Tensor]
"""Images, float32 (B, 3, H, W), normalised, and labels, int64 (B,)."""
Batches = Generator[Loaded, None, None]
# Rounds of some seconds must not meet an epoch's end; see `Work.num_repeats`.
_IMAGES_PER_THREAD = 8192
Pixels = Literal["tensor", "pil"]
"""What decodes and resizes: torchvision, or Pillow."""
TIMM_POLICY = "rand-m9-mstd0.5-inc1"


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


class Transform:
    """Transform of a JPEG's bytes into a normalised float32 tensor (3, H, W).

    RandAugment is torchvision's own, or for Pillow's images timm's, which needs those.
    """

    def __init__(self, work: Work, *, pixels: Pixels) -> None:
        self._pixels = pixels
        steps: list[Any] = [
            v2.RandomResizedCrop(
                work.img_size,
                scale=work.scale,
                ratio=work.ratio,
                interpolation=v2.InterpolationMode.BILINEAR,
                antialias=True,
            ),
            v2.RandomHorizontalFlip(work.hflip),
        ]
        if work.rand_augment:
            own = v2.RandAugment(num_ops=2, magnitude=9)
            steps.append(own if pixels == "tensor" else _timm_policy(work))
        if pixels == "pil":
            steps.append(v2.PILToTensor())
        steps += [
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
        self._steps = v2.Compose(steps)

    def __call__(self, data: bytes) -> Tensor:
        if self._pixels == "pil":
            return self._steps(Image.open(io.BytesIO(data)).convert("RGB"))
        # A copy, since torch warns of memory that it can't write to.
        encoded = torch.from_numpy(np.frombuffer(data, np.uint8).copy())
        return self._steps(decode_jpeg(encoded, mode=ImageReadMode.RGB))

    def stack(self, images: Sequence[bytes]) -> Tensor:
        """Decode a batch: float32 (B, 3, H, W)."""
        return torch.stack([self(data) for data in images])

    def collate(self, samples: Sequence[dict[str, Any]]) -> Loaded:
        """Decode samples {image, label} into a batch."""
        labels = torch.tensor([int(sample["label"]) for sample in samples])
        return self.stack([sample["image"] for sample in samples]), labels


def _timm_policy(work: Work) -> Any:
    # As timm's own loader sets it up.
    settings = {
        "translate_const": int(work.img_size * 0.45),
        "img_mean": tuple(min(255, round(255 * mean)) for mean in IMAGENET_MEAN),
    }
    transform = rand_augment_transform(TIMM_POLICY, settings)
    for op in transform.ops:
        # At 10 timm asks for posterizing to no bits, which Pillow 13 refuses.
        op.magnitude_max = 9.99
    return transform
