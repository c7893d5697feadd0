"""Decode and augment with torchvision, as most rivals do in their workers."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import v2

from benchmarks.work import Loaded, Work
from pipelines.config import IMAGENET_MEAN, IMAGENET_STD

Pixels = Literal["tensor", "pil"]
Policy = Literal["timm", "torchvision"]
TIMM_POLICY = "rand-m9-mstd0.5-inc1"


class Transform:
    """Transform of a JPEG's bytes into a normalised float32 tensor (3, H, W).

    Args:
        pixels: tensor decodes and resizes with torchvision, pil with Pillow.
        policy: Where the work has RandAugment: timm's, which needs Pillow's images, or
            torchvision's own of two operations at magnitude 9.
    """

    def __init__(self, work: Work, *, pixels: Pixels, policy: Policy) -> None:
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
            steps.append(_rand_augment(work, policy=policy))
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


def _rand_augment(work: Work, *, policy: Policy) -> Any:
    if policy == "torchvision":
        return v2.RandAugment(num_ops=2, magnitude=9)
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
