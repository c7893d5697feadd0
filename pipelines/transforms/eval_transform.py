"""Decode images as evaluation does, without Ray, DALI or shards."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pipelines.config import Augment, Data
from pipelines.transforms.cpu import HostDecoder
from pipelines.transforms.crops import center_crop
from pipelines.transforms.normalize import Finisher
from pipelines.transforms.pillow_decode import PillowWindows, stored_size
from pipelines.transforms.sampling import Draws, PixelSettings


def decode_eval(encoded: Sequence[bytes], *, data: Data, img_size: int) -> Tensor:
    """Decode images for evaluation: float32 (B, 3, img_size, img_size) on the CPU.

    Raises BadImageError where one of them is bad.
    """
    settings = PixelSettings(
        data=data, augment=Augment(), img_size=img_size, seed=0, train=False
    )
    exif = data.exif
    sizes = np.array([stored_size(item, exif=exif) for item in encoded])
    geometry = center_crop(
        heights=sizes[:, 0],
        widths=sizes[:, 1],
        img_size=img_size,
        crop_pct=data.crop_pct,
        interpolation=data.eval_interpolation,
    )
    decoder = HostDecoder(
        PillowWindows(exif=exif), img_size=img_size, fill=settings.fill, num_threads=1
    )
    draws = Draws(geometry=geometry, ops=None, boxes=None)
    views = [np.frombuffer(item, np.uint8) for item in encoded]
    finisher = Finisher(settings, device=torch.device("cpu"), num_threads=1)
    return finisher(decoder(views, draws), draws)
