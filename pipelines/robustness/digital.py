"""Corrupt digitally: contrast, elastic, pixelate and JPEG, as ImageNet-C has them.

Hendrycks & Dietterich (arXiv 1903.12261). Lengths are pixels of a 224x224 image,
whatever the size. Pixels and levels are as in `noise`.
"""

from __future__ import annotations

import io

import numpy as np
from numpy.random import RandomState
from PIL import Image

_CONTRAST = (0.4, 0.3, 0.2, 0.1, 0.05)
_PIXELATE = (0.6, 0.5, 0.4, 0.3, 0.25)
_JPEG_QUALITY = (25, 18, 15, 10, 7)
_ELASTIC_SIZE = 244
"""Pixels that the elastic lengths below count; a slip of the published code for 224."""
_ELASTIC = (
    (2, 0.7, 0.1),
    (2, 0.08, 0.2),
    (0.05, 0.01, 0.02),
    (0.07, 0.01, 0.02),
    (0.12, 0.01, 0.02),
)
"""Strength and smoothness of the waves, reach of the three corners."""


def contrast(pixels: np.ndarray, *, severity: int, random: RandomState) -> np.ndarray:
    """Reduce contrast: scale values towards their channel's mean."""
    mean = pixels.mean(axis=(0, 1))
    return mean + _CONTRAST[severity - 1] * (pixels - mean)


def pixelate(pixels: np.ndarray, *, severity: int, random: RandomState) -> np.ndarray:
    """Downsample an image and upsample it again by box averages."""
    image = Image.fromarray(pixels)
    small = [int(side * _PIXELATE[severity - 1]) for side in image.size]
    image = image.resize((max(small[0], 1), max(small[1], 1)), Image.Resampling.BOX)
    return np.asarray(image.resize(pixels.shape[1::-1], Image.Resampling.BOX))


def jpeg_compression(
    pixels: np.ndarray, *, severity: int, random: RandomState
) -> np.ndarray:
    """Encode an image as a low-quality JPEG and decode it again."""
    return through_jpeg(pixels, quality=_JPEG_QUALITY[severity - 1])


def through_jpeg(pixels: np.ndarray, *, quality: int) -> np.ndarray:
    """Encode uint8 pixels (H, W, 3) as a JPEG and decode them again."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file))


def elastic_transform(
    pixels: np.ndarray, *, severity: int, random: RandomState
) -> np.ndarray:
    """Apply a random affine map, then displace each pixel by a smooth random field."""
    strength, smoothness, reach = (
        _ELASTIC_SIZE * part for part in _ELASTIC[severity - 1]
    )
    height, width = pixels.shape[:2]
    rows, columns = np.indices((height, width), np.float64)
    back = _sheared_back(height, width, reach=reach, random=random)
    places = np.tensordot(back, np.stack([columns, rows, np.ones_like(rows)]), axes=1)
    sheared = _sampled(pixels, rows=places[1], columns=places[0], mode="mirror")
    waves = [
        strength * _smooth(random.uniform(-1, 1, (height, width)), std=smoothness)
        for _ in ("across", "down")
    ]
    return _sampled(
        sheared, rows=rows + waves[1], columns=columns + waves[0], mode="reflect"
    )


def _sheared_back(
    height: int, width: int, *, reach: float, random: RandomState
) -> np.ndarray:
    """Draw the affine map (2, 3) from new coordinates (x, y, 1) to old ones."""
    middle = np.array([height, width], np.float64) // 2
    arm = min(height, width) // 3
    old = np.stack([middle + arm, [middle[0] + arm, middle[1] - arm], middle - arm])
    new = old + random.uniform(-reach, reach, old.shape)
    # Three points and what they come from fix the map.
    return np.linalg.solve(np.column_stack([new, np.ones(3)]), old).T


def _smooth(values: np.ndarray, *, std: float) -> np.ndarray:
    from scipy.ndimage import gaussian_filter

    return gaussian_filter(values, std, mode="reflect", truncate=3)


def _sampled(
    pixels: np.ndarray, *, rows: np.ndarray, columns: np.ndarray, mode: str
) -> np.ndarray:
    """Sample an image (H, W, 3) at coordinates (H, W), bilinearly."""
    from scipy.ndimage import map_coordinates

    channels = [
        map_coordinates(channel, [rows, columns], np.float64, order=1, mode=mode)
        for channel in np.moveaxis(pixels, 2, 0)
    ]
    return np.stack(channels, axis=2)
