"""Corrupt by blur: defocus, glass, motion and zoom, as ImageNet-C has them.

Hendrycks & Dietterich (arXiv 1903.12261), whose images came out of OpenCV, scikit-image
and ImageMagick; their definitions are written out here on NumPy and SciPy. Lengths are
pixels of a 224x224 image, whatever the size. Pixels and levels are as in `noise`.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.random import RandomState

_DEFOCUS = ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5))
"""Radius of the disk, and deviation of the Gaussian that softens its edge."""
_GLASS = ((0.7, 1, 2), (0.9, 2, 1), (1.0, 2, 3), (1.1, 3, 2), (1.5, 4, 2))
"""Deviation of the Gaussian, furthest neighbour, rounds."""
_MOTION = ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))
"""Radius and deviation of the smear."""
_ZOOM = ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03))
"""End and step of the zoom factors, which begin at 1."""


def defocus_blur(
    pixels: np.ndarray, *, severity: int, random: RandomState
) -> np.ndarray:
    """Blur with a disk, as a lens out of focus does."""
    from scipy.signal import fftconvolve

    radius, edge_std = _DEFOCUS[severity - 1]
    kernel = _soft_disk(radius, edge_std=edge_std)
    margin = len(kernel) // 2
    around = ((margin, margin), (margin, margin), (0, 0))
    padded = np.pad(pixels.astype(np.float64), around, mode="reflect")
    # A disk looks the same from both sides: convolution is correlation.
    return fftconvolve(padded, kernel[:, :, None], mode="valid", axes=(0, 1))


def _soft_disk(radius: int, *, edge_std: float) -> np.ndarray:
    """Build a disk kernel (k, k), its edge softened over 3 or 5 pixels."""
    from scipy.ndimage import correlate1d

    reach = max(radius, 8)
    steps = np.arange(-reach, reach + 1)
    disk = (steps[:, None] ** 2 + steps**2 <= radius**2).astype(np.float64)
    disk /= disk.sum()
    half = 1 if radius <= 8 else 2
    edge = np.exp(-(np.arange(-half, half + 1) ** 2) / (2 * edge_std**2))
    for axis in (0, 1):
        disk = correlate1d(disk, edge / edge.sum(), axis=axis, mode="mirror")
    return disk


def glass_blur(pixels: np.ndarray, *, severity: int, random: RandomState) -> np.ndarray:
    """Take values from nearby pixels, between two Gaussian blurs."""
    from scipy.ndimage import gaussian_filter

    std, reach, num_rounds = _GLASS[severity - 1]
    blur = {"sigma": (std, std, 0), "mode": "nearest"}
    whole = gaussian_filter(pixels.astype(np.float64), **blur).astype(np.uint8)
    height, width = pixels.shape[:2]
    for _ in range(num_rounds):
        moves = random.randint(-reach, reach, size=(2, height, width))
        sources = scattered(height, width, moves=moves, reach=reach)
        whole = whole.reshape(-1, 3)[sources].reshape(whole.shape)
    return gaussian_filter(whole.astype(np.float64), **blur)


def scattered(height: int, width: int, *, moves: np.ndarray, reach: int) -> np.ndarray:
    """Compute the source of each pixel's value after one round of glass blur.

    The published images were made pixel by pixel, from the last to the first, each
    taking over what its neighbour shows at that moment; the neighbour keeps its own
    value, since NumPy's exchange of two views copies one way. So a pixel shows its
    neighbour's old value where that comes later in this order, and else whatever the
    neighbour took: a chain, followed here for all pixels at once.

    Args:
        moves: int (2, height, width), how far down and right the neighbour is; only
            those of pixels from `reach + 1` to the size less `reach` count.

    Returns:
        int64 (height * width,): flat places.
    """
    places = np.arange(height * width).reshape(height, width)
    inner = (slice(reach + 1, height - reach + 1), slice(reach + 1, width - reach + 1))
    rows, columns = np.indices((height, width))
    # A step over the last row or column would leave the image.
    down = np.minimum(rows + moves[0], height - 1)
    right = np.minimum(columns + moves[1], width - 1)
    taken = places.copy()
    taken[inner] = (down * width + right)[inner]
    flat, own = taken.ravel(), places.ravel()
    follows = flat > own
    while follows.any():
        # Each link is replaced by two: chains are done in the log of their length.
        flat, follows = (
            np.where(follows, flat[flat], flat),
            follows & follows[flat],
        )
    return flat


def motion_blur(
    pixels: np.ndarray, *, severity: int, random: RandomState
) -> np.ndarray:
    """Blur along a direction within 45 degrees of the horizontal."""
    radius, std = _MOTION[severity - 1]
    angle_deg = random.uniform(-45, 45)
    return smear(pixels, radius=radius, std=std, angle_deg=angle_deg)


def smear(
    pixels: np.ndarray, *, radius: int, std: float, angle_deg: float
) -> np.ndarray:
    """Blur along a direction with half a Gaussian, like ImageMagick's motion blur.

    Args:
        pixels: (H, W, C) or (H, W).
        radius: The smear is 2 * radius + 1 pixels long.

    Returns:
        Whole levels, as float32 of the same shape.
    """
    num_taps = 2 * radius + 1
    weights = np.exp(-(np.arange(num_taps) ** 2) / (2 * std**2))
    weights /= weights.sum()
    angle_rad = math.radians(angle_deg)
    around = [(num_taps, num_taps)] * 2 + [(0, 0)] * (pixels.ndim - 2)
    padded = np.pad(pixels.astype(np.float32), around, mode="edge")
    height, width = pixels.shape[:2]
    smeared = np.zeros(pixels.shape, np.float32)
    for at in range(num_taps):
        right = num_taps + math.ceil(at * math.cos(angle_rad) - 0.5)
        down = num_taps + math.ceil(at * math.sin(angle_rad) - 0.5)
        shifted = padded[down : down + height, right : right + width]
        smeared += np.float32(weights[at]) * shifted
    return np.rint(smeared)


def zoom_blur(pixels: np.ndarray, *, severity: int, random: RandomState) -> np.ndarray:
    """Average an image with increasingly zoomed copies of itself."""
    end, step = _ZOOM[severity - 1]
    factors = np.arange(1, end, step)
    total = pixels.astype(np.float32)
    for factor in factors:
        total = total + zoomed(pixels.astype(np.float32), factor=factor)
    return total / (len(factors) + 1)


def zoomed(pixels: np.ndarray, *, factor: float) -> np.ndarray:
    """Zoom into the centre, linearly: floats (H, W, C) or (H, W) of the same shape.

    As `scipy.ndimage.zoom` of order 1 does, in a fraction of its time.
    """
    for _ in ("down", "across"):
        size = len(pixels)
        num_kept = math.ceil(size / factor)
        start = (size - num_kept) // 2
        long = _stretched(
            pixels[start : start + num_kept], num=round(num_kept * factor)
        )
        start = (len(long) - size) // 2
        pixels = long[start : start + size].swapaxes(0, 1)
    return pixels


def _stretched(values: np.ndarray, *, num: int) -> np.ndarray:
    """Interpolate along the first axis to `num` rows; the first and last stay."""
    at = np.arange(num) * ((len(values) - 1) / (num - 1))
    low = np.minimum(at.astype(np.int64), len(values) - 2)
    share = (at - low).astype(values.dtype).reshape(-1, *[1] * (values.ndim - 1))
    return values[low] + share * (values[low + 1] - values[low])
