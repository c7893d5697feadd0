"""Compute crop windows and flips as numbers, without touching pixels.

Decoders take these as inputs, so a sample's pixels depend on (seed, epoch, sample)
alone, and DALI and the torch path do the same thing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from pipelines.rng import Purpose, key, uniform

_NUM_TRIES = 10
_MAX_RESIZED_PIXELS = 1 << 26
# Crops that are resized on each side of the one shown: that a window is whole pixels
# then changes the scale by little, and what bicubic interpolation looks at is there.
_MARGIN = 4


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """Geometry of a batch's images: the window, its resizing, the final crop, the flip.

    All arrays are int64 of shape (n, 2), height first, but `bicubic` and `flip`, bool
    of shape (n,).
    """

    start: np.ndarray
    """Top left corner of the window cut from the stored image."""
    window: np.ndarray
    """Height and width of that window."""
    resized: np.ndarray
    """Height and width that the window is resized to."""
    bicubic: np.ndarray
    """Whether the resize is bicubic, else bilinear; both are antialiased."""
    crop: np.ndarray
    """Top left corner of the final square in the resized window."""
    flip: np.ndarray


def random_resized_crop(
    ids: np.ndarray,
    *,
    heights: np.ndarray,
    widths: np.ndarray,
    seed: int,
    epoch: int,
    img_size: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    hflip: float,
    interpolation: Literal["bilinear", "bicubic", "random"],
) -> Geometry:
    """Draw the windows of training: Inception's random resized crop, as torchvision's.

    A window's area is uniform in `scale` of the image's, its aspect ratio log-uniform
    in `ratio`; the first of ten tries that fits is taken, else the largest centred
    window within `ratio`.

    Args:
        ids: int64 of shape (n,): draw ids, a number for each image and repetition.
        interpolation: random tosses a coin for each image, as timm does.
    """
    draws = uniform(ids, key=key(seed, epoch, Purpose.CROP), num_draws=4 * _NUM_TRIES)
    area_draw, ratio_draw, top, left = np.moveaxis(
        draws.reshape(-1, _NUM_TRIES, 4), 2, 0
    )
    area = (heights * widths)[:, None] * (scale[0] + area_draw * (scale[1] - scale[0]))
    low, high = math.log(ratio[0]), math.log(ratio[1])
    aspect = np.exp(low + ratio_draw * (high - low))
    tried_w = np.rint(np.sqrt(area * aspect)).astype(np.int64)
    tried_h = np.rint(np.sqrt(area / aspect)).astype(np.int64)
    fits = (tried_w > 0) & (tried_w <= widths[:, None])
    fits &= (tried_h > 0) & (tried_h <= heights[:, None])
    first = fits.argmax(axis=1)
    rows = np.arange(len(ids))
    window = np.stack([tried_h[rows, first], tried_w[rows, first]], axis=1)
    size = np.stack([heights, widths], axis=1)
    place = np.stack([top[rows, first], left[rows, first]], axis=1)
    start = np.floor(place * (size - window + 1)).astype(np.int64)
    none_fits = ~fits.any(axis=1)
    window[none_fits] = _largest_window(size[none_fits], ratio=ratio)
    start[none_fits] = (size[none_fits] - window[none_fits]) // 2
    flip = uniform(ids, key=key(seed, epoch, Purpose.FLIP))[:, 0] < hflip
    coin = uniform(ids, key=key(seed, epoch, Purpose.INTERPOLATION))[:, 0]
    share = {"bilinear": 0.0, "random": 0.5, "bicubic": 1.0}[interpolation]
    return Geometry(
        start=start,
        window=window,
        resized=np.full_like(window, img_size),
        bicubic=coin < share,
        crop=np.zeros_like(window),
        flip=flip,
    )


def _largest_window(size: np.ndarray, *, ratio: tuple[float, float]) -> np.ndarray:
    """Return the whole image's size, narrowed where its ratio is out of bounds."""
    height, width = size[:, 0], size[:, 1]
    aspect = width / height
    window_w = np.where(aspect > ratio[1], np.rint(height * ratio[1]), width)
    window_h = np.where(aspect < ratio[0], np.rint(width / ratio[0]), height)
    return np.maximum(np.stack([window_h, window_w], axis=1).astype(np.int64), 1)


def center_crop(
    *,
    heights: np.ndarray,
    widths: np.ndarray,
    img_size: int,
    crop_pct: float,
    interpolation: Literal["bilinear", "bicubic"],
) -> Geometry:
    """Compute evaluation's windows: short side to img_size / crop_pct, centre crop.

    Roundings are those of torchvision and timm: the short side's length and the long
    side's are cut to whole pixels, the crop's corner is rounded. Of a picture that
    would be resized to more than 64 million pixels only the middle is, within a pixel
    of the same place: whole, 20000x2 at 224 pixels would take gigabytes.
    """
    short = math.floor(img_size / crop_pct)
    size = np.stack([heights, widths], axis=1)
    long_side = (short * size.max(axis=1) / size.min(axis=1)).astype(np.int64)
    is_short = size == size.min(axis=1, keepdims=True)
    resized = np.where(is_short, short, long_side[:, None])
    whole = Geometry(
        start=np.zeros_like(size),
        window=size,
        resized=resized,
        bicubic=np.full(len(size), interpolation == "bicubic"),
        crop=np.rint((resized - img_size) / 2).astype(np.int64),
        flip=np.zeros(len(size), dtype=bool),
    )
    is_banner = ~is_short & (resized.prod(axis=1) > _MAX_RESIZED_PIXELS)[:, None]
    return _middle(whole, of=is_banner, img_size=img_size) if is_banner.any() else whole


def _middle(whole: Geometry, *, of: np.ndarray, img_size: int) -> Geometry:
    """Cut windows to what the crop shows, where `of`, bool of (n, 2), is true."""
    scale = whole.resized / whole.window
    margin = np.ceil(_MARGIN * img_size / scale).astype(np.int64) + _MARGIN
    first = np.floor(whole.crop / scale).astype(np.int64) - margin
    last = np.ceil((whole.crop + img_size) / scale).astype(np.int64) + margin
    start = np.where(of, np.maximum(first, 0), whole.start)
    window = np.where(of, np.minimum(last, whole.window) - start, whole.window)
    resized = np.where(of, np.rint(window * scale).astype(np.int64), whole.resized)
    crop = whole.crop - np.rint(start * scale).astype(np.int64)
    crop = np.where(of, crop.clip(0, np.maximum(resized - img_size, 0)), whole.crop)
    return replace(whole, start=start, window=window, resized=resized, crop=crop)
