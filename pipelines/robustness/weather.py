"""Corrupt by weather: snow, frost, fog and brightness, as ImageNet-C has them.

Hendrycks & Dietterich (arXiv 1903.12261). Lengths are pixels of a 224x224 image,
whatever the size. Pixels and levels are as in `noise`.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from importlib import resources

import numpy as np
from numpy.random import RandomState
from PIL import Image

from pipelines.robustness.blur import smear, zoomed

_FROST = ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75))
"""Weights of the image and of the frost."""
_FOG = ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4))
"""Thickness, and how fast details fade."""
_BRIGHTER = (0.1, 0.2, 0.3, 0.4, 0.5)
_GREY = np.array([0.299, 0.587, 0.114])
_FROSTS = (1, 2, 2, 3, 4)
"""Photographs by their number in torch-uncertainty-assets. The published code draws
from the first five of its six files, of which the second and third show the same."""


@dataclass(frozen=True, kw_only=True)
class Snow:
    """Parameters of snow at one severity."""

    mean: float
    std: float
    """Of the noise that the flakes are made of, as a fraction of the full range."""
    zoom: float
    threshold: float
    """Noise below it is no flake."""
    radius: int
    smear_std: float
    kept: float
    """Weight of the image; the rest whitens."""


_SNOW = (
    Snow(mean=0.1, std=0.3, zoom=3, threshold=0.5, radius=10, smear_std=4, kept=0.8),
    Snow(mean=0.2, std=0.3, zoom=2, threshold=0.5, radius=12, smear_std=4, kept=0.7),
    Snow(mean=0.55, std=0.3, zoom=4, threshold=0.9, radius=12, smear_std=8, kept=0.7),
    Snow(
        mean=0.55, std=0.3, zoom=4.5, threshold=0.85, radius=12, smear_std=8, kept=0.65
    ),
    Snow(
        mean=0.55, std=0.3, zoom=2.5, threshold=0.85, radius=12, smear_std=12, kept=0.55
    ),
)


def snow(pixels: np.ndarray, *, severity: int, random: RandomState) -> np.ndarray:
    """Whiten an image and add flakes that fall from both sides."""
    kind = _SNOW[severity - 1]
    layer = flakes(pixels.shape[0], pixels.shape[1], snow=kind, random=random)
    angle_deg = random.uniform(-135, -45)
    return snowed(pixels, layer, snow=kind, angle_deg=angle_deg)


def flakes(height: int, width: int, *, snow: Snow, random: RandomState) -> np.ndarray:
    """Draw flakes before they fall: uint8 levels (height, width)."""
    layer = zoomed(
        random.normal(snow.mean, snow.std, (height, width)), factor=snow.zoom
    )
    layer[layer < snow.threshold] = 0
    return (255 * layer.clip(0, 1)).astype(np.uint8)


def snowed(
    pixels: np.ndarray, layer: np.ndarray, *, snow: Snow, angle_deg: float
) -> np.ndarray:
    """Blur flakes along their fall and add them to the whitened image."""
    fallen = smear(layer, radius=snow.radius, std=snow.smear_std, angle_deg=angle_deg)
    fallen = fallen + np.rot90(fallen, k=2)
    white = (pixels @ _GREY * 1.5 + 127.5)[:, :, None]
    whitened = snow.kept * pixels + (1 - snow.kept) * np.maximum(pixels, white)
    return whitened + fallen[:, :, None]


def frost(pixels: np.ndarray, *, severity: int, random: RandomState) -> np.ndarray:
    """Blend a piece of a photograph of frost into an image.

    The photographs are the published ones, from the package torch-uncertainty-assets;
    one that is smaller than the image is enlarged to fit.

    Raises ValueError where that package is not installed.
    """
    kept, added = _FROST[severity - 1]
    height, width = pixels.shape[:2]
    frozen = _photograph(_FROSTS[random.randint(len(_FROSTS))], height + 1, width + 1)
    top = random.randint(frozen.shape[0] - height)
    left = random.randint(frozen.shape[1] - width)
    return kept * pixels + added * frozen[top : top + height, left : left + width]


# Decoding a photograph takes as long as the rest ten times over.
@functools.lru_cache(maxsize=2 * len(_FROSTS))
def _photograph(number: int, height: int, width: int) -> np.ndarray:
    """Load a photograph of frost, enlarged to at least a size: uint8 (h, w, 3)."""
    try:
        folder = resources.files("torch_uncertainty_assets.frost")
    except ModuleNotFoundError:
        raise ValueError(
            "expected photographs for the corruption frost, got an environment without "
            "torch-uncertainty-assets; install the extra 'robustness' or name the "
            "other --corruptions"
        ) from None
    with (folder / f"frost{number}.jpg").open("rb") as file:
        image = Image.open(file).convert("RGB")
    larger = max(height / image.height, width / image.width, 1)
    if larger > 1:
        size = math.ceil(image.width * larger), math.ceil(image.height * larger)
        image = image.resize(size, Image.Resampling.BICUBIC)
    return np.asarray(image)


def fog(pixels: np.ndarray, *, severity: int, random: RandomState) -> np.ndarray:
    """Add a plasma cloud and rescale to the brightest level."""
    thickness, decay = _FOG[severity - 1]
    height, width = pixels.shape[:2]
    size = 1 << (max(height, width) - 1).bit_length()
    cloud = plasma(size, decay=decay, random=random)[:height, :width, None]
    brightest = float(pixels.max()) / 255
    return (pixels + 255 * thickness * cloud) * (brightest / (brightest + thickness))


def plasma(size: int, *, decay: float, random: RandomState) -> np.ndarray:
    """Generate a cloud (size, size) from 0 to 1 by midpoint displacement on a torus.

    The diamond-square algorithm: the mean of four neighbours and a uniform draw, whose
    width falls by `decay` as the grid is halved. `size` is a power of two.
    """
    heights = np.zeros((size, size))
    step, reach = size, 100.0
    while step >= 2:
        half = step // 2
        corners = heights[::step, ::step]
        pairs = corners + np.roll(corners, -1, axis=0)
        middles = pairs + np.roll(pairs, -1, axis=1)
        heights[half::step, half::step] = _moved(middles, reach=reach, random=random)
        centres = heights[half::step, half::step]
        rows = centres + np.roll(centres, 1, axis=0)
        rows += corners + np.roll(corners, -1, axis=1)
        heights[::step, half::step] = _moved(rows, reach=reach, random=random)
        columns = centres + np.roll(centres, 1, axis=1)
        columns += corners + np.roll(corners, -1, axis=0)
        heights[half::step, ::step] = _moved(columns, reach=reach, random=random)
        step, reach = half, reach / decay
    heights -= heights.min()
    return heights / heights.max()


def _moved(sums: np.ndarray, *, reach: float, random: RandomState) -> np.ndarray:
    # As published, the draw counts twice by its reach.
    return sums / 4 + reach * random.uniform(-reach, reach, sums.shape)


def brightness(pixels: np.ndarray, *, severity: int, random: RandomState) -> np.ndarray:
    """Raise the V of an image's HSV."""
    return brightened(pixels, by=_BRIGHTER[severity - 1])


def brightened(pixels: np.ndarray, *, by: float) -> np.ndarray:
    """Add to HSV's V a fraction of the full range, at the same hue and saturation.

    The value is the largest channel, and with the other two fixed all channels are
    proportional to it; black, which has no hue, becomes grey.
    """
    value = pixels.max(axis=2, keepdims=True).astype(np.float64)
    wanted = (value + 255 * by).clip(0, 255)
    return np.where(value > 0, pixels * (wanted / np.maximum(value, 1)), wanted)
