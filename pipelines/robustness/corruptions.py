"""Corrupt images as ImageNet-C does: 15 kinds, each of severity 1 to 5.

Hendrycks & Dietterich (arXiv 1903.12261). What is drawn for an image depends on (seed,
corruption, severity, image) alone, by NumPy's RandomState, whose numbers are fixed for
ever: not on the batch, the order, the threads or the machine.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal, Protocol, get_args

import numpy as np
from numpy.random import RandomState

from pipelines import rng
from pipelines.robustness import blur, digital, noise, weather

Corruption = Literal[
    "gaussian_noise",
    "shot_noise",
    "impulse_noise",
    "defocus_blur",
    "glass_blur",
    "motion_blur",
    "zoom_blur",
    "snow",
    "frost",
    "fog",
    "brightness",
    "contrast",
    "elastic_transform",
    "pixelate",
    "jpeg_compression",
]
CORRUPTIONS: tuple[Corruption, ...] = get_args(Corruption)
SEVERITIES = (1, 2, 3, 4, 5)


class Corrupt(Protocol):
    """Protocol for a corruption: uint8 pixels (H, W, 3) to levels around 0 to 255."""

    def __call__(
        self, pixels: np.ndarray, *, severity: int, random: RandomState
    ) -> np.ndarray: ...


_FUNCTIONS: Mapping[Corruption, Corrupt] = MappingProxyType(
    {
        "gaussian_noise": noise.gaussian_noise,
        "shot_noise": noise.shot_noise,
        "impulse_noise": noise.impulse_noise,
        "defocus_blur": blur.defocus_blur,
        "glass_blur": blur.glass_blur,
        "motion_blur": blur.motion_blur,
        "zoom_blur": blur.zoom_blur,
        "snow": weather.snow,
        "frost": weather.frost,
        "fog": weather.fog,
        "brightness": weather.brightness,
        "contrast": digital.contrast,
        "elastic_transform": digital.elastic_transform,
        "pixelate": digital.pixelate,
        "jpeg_compression": digital.jpeg_compression,
    }
)


def corrupt(
    pixels: np.ndarray,
    *,
    corruption: Corruption,
    severity: int,
    seed: int,
    row_id: int,
) -> np.ndarray:
    """Corrupt one image: uint8 (H, W, 3) of the same shape.

    Args:
        severity: 1 to 5; 0 leaves the image as it is.
        row_id: Place of the image in its set.
    """
    if severity not in (0, *SEVERITIES):
        raise ValueError(
            f"expected a severity from 1 to 5, or 0 for none, got {severity}; set "
            "--severities"
        )
    if severity == 0:
        return pixels
    random = random_of(seed, corruption, severity, row_id)
    return quantized(_FUNCTIONS[corruption](pixels, severity=severity, random=random))


def quantized(levels: np.ndarray) -> np.ndarray:
    """Clip levels and truncate them to uint8, as the published images were."""
    return levels if levels.dtype == np.uint8 else levels.clip(0, 255).astype(np.uint8)


def random_of(seed: int, name: str, *parts: int) -> RandomState:
    """Build the generator for one image and one named purpose."""
    folded = rng.key(seed, zlib.crc32(name.encode()), *parts)
    return RandomState(np.array([folded & 0xFFFFFFFF, folded >> 32], np.uint32))
