"""Corrupt by noise: Gaussian, shot and impulse, as ImageNet-C has them.

Hendrycks & Dietterich (arXiv 1903.12261); strengths are those of the published images
of 224x224. Each function maps uint8 pixels (H, W, 3) to levels from 0 to 255
as floats, which `corruptions.quantized` cuts to whole ones.
"""

from __future__ import annotations

import numpy as np
from numpy.random import RandomState

_GAUSSIAN_STD = (0.08, 0.12, 0.18, 0.26, 0.38)
_SHOT_PHOTONS = (60, 25, 12, 5, 3)
_IMPULSE_SHARE = (0.03, 0.06, 0.09, 0.17, 0.27)


def gaussian_noise(
    pixels: np.ndarray, *, severity: int, random: RandomState
) -> np.ndarray:
    """Add normal noise to every value."""
    return add_gaussian(pixels, std=_GAUSSIAN_STD[severity - 1], random=random)


def shot_noise(pixels: np.ndarray, *, severity: int, random: RandomState) -> np.ndarray:
    """Add shot noise: a Poisson draw of every value."""
    return count_photons(pixels, num=_SHOT_PHOTONS[severity - 1], random=random)


def impulse_noise(
    pixels: np.ndarray, *, severity: int, random: RandomState
) -> np.ndarray:
    """Set a share of the values to black or white, per channel."""
    hit = random.random_sample(pixels.shape) < _IMPULSE_SHARE[severity - 1]
    white = random.random_sample(pixels.shape) < 0.5
    return np.where(hit, np.where(white, 255.0, 0.0), pixels)


def add_gaussian(pixels: np.ndarray, *, std: float, random: RandomState) -> np.ndarray:
    """Add normal noise, its deviation as a fraction of the full range."""
    return pixels + 255 * std * random.standard_normal(pixels.shape)


def count_photons(pixels: np.ndarray, *, num: float, random: RandomState) -> np.ndarray:
    """Draw Poisson counts, with `num` photons for white."""
    return random.poisson(pixels * (num / 255)) * (255 / num)
