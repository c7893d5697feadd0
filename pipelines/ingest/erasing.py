"""Erase boxes of normalised images (Zhong et al., 2020), as timm's RandomErasing.

Where and whether is drawn as numbers before a pixel is touched; what a box holds comes
from a generator that the box's own key seeds, so neither depends on the batch. DALI's
`erase` knows constants only, so this is plain torch, on any device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from pipelines.hashing import Purpose, key, mix64, uniform

EraseMode = Literal["const", "rand", "pixel"]
_MIN_AREA, _MAX_AREA, _MIN_ASPECT = 0.02, 1 / 3, 0.3
_NUM_TRIES = 10
# A try draws area, aspect, top and left; two draws are for all of an image's boxes.
_DRAWS_PER_TRY, _SHARED_DRAWS = 4, 2


@dataclass(frozen=True, kw_only=True)
class Boxes:
    """Say for each image which boxes are erased, in order; a height of 0 is none.

    All arrays are int64 of shape (n, k), but `keys`, uint64.
    """

    tops: np.ndarray
    lefts: np.ndarray
    heights: np.ndarray
    widths: np.ndarray
    keys: np.ndarray
    """Seeds of what the boxes hold."""


def erase_boxes(
    draw_ids: np.ndarray,
    *,
    prob: float,
    count: int,
    img_size: int,
    seed: int,
    epoch: int,
) -> Boxes:
    """Draw boxes by timm's rules.

    An image is chosen with `prob` and gets 1 to `count` boxes. They share out an area
    of 2 % to a third of the image, each with an aspect log-uniform from 0.3 to 1 / 0.3;
    the first of ten tries that is smaller than the image in both directions is taken.

    Args:
        draw_ids: Whole numbers of shape (n,).
    """
    erase_key = key(seed, epoch, Purpose.ERASE)
    num_draws = _SHARED_DRAWS + count * _NUM_TRIES * _DRAWS_PER_TRY
    draws = uniform(draw_ids, key=erase_key, num_draws=num_draws)
    chosen = draws[:, 0] < prob
    num_boxes = np.where(chosen, 1 + np.floor(draws[:, 1] * count), 0)[:, None]
    tries = draws[:, _SHARED_DRAWS:].reshape(-1, count, _NUM_TRIES, _DRAWS_PER_TRY)
    area, aspect, top, left = np.moveaxis(tries, 3, 0)
    area = (_MIN_AREA + area * (_MAX_AREA - _MIN_AREA)) * img_size**2
    area /= np.maximum(num_boxes, 1)[:, :, None]
    log_aspect = math.log(_MIN_ASPECT)
    aspect = np.exp(log_aspect * (1 - 2 * aspect))
    height = np.rint(np.sqrt(area * aspect)).astype(np.int64)
    width = np.rint(np.sqrt(area / aspect)).astype(np.int64)
    fits = (height < img_size) & (width < img_size)
    first = fits.argmax(axis=2)[:, :, None]

    def of_first(values: np.ndarray) -> np.ndarray:
        return np.take_along_axis(values, first, axis=2)[:, :, 0]

    wanted = of_first(fits) & (np.arange(count) < num_boxes)
    heights = np.where(wanted, of_first(height), 0)
    widths = np.where(wanted, of_first(width), 0)
    with np.errstate(over="ignore"):
        keys = mix64(draw_ids.astype(np.uint64) ^ np.uint64(erase_key))[:, None]
        keys = mix64(keys + np.arange(count, dtype=np.uint64))
    return Boxes(
        tops=np.floor(of_first(top) * (img_size - heights + 1)).astype(np.int64),
        lefts=np.floor(of_first(left) * (img_size - widths + 1)).astype(np.int64),
        heights=heights,
        widths=widths,
        keys=keys,
    )


def erase(images: Tensor, boxes: Boxes, *, mode: EraseMode) -> Tensor:
    """Erase boxes of float images (B, C, H, W), in place; returns the same tensor.

    const fills with zeros, rand with one normal number a channel, pixel with normal
    numbers.
    """
    source = torch.Generator(device=images.device)
    for row, column in np.argwhere(boxes.heights > 0).tolist():
        top, left = int(boxes.tops[row, column]), int(boxes.lefts[row, column])
        height, width = int(boxes.heights[row, column]), int(boxes.widths[row, column])
        box = images[row, :, top : top + height, left : left + width]
        if mode == "const":
            box.zero_()
            continue
        # Generators take seeds of 63 bits.
        source.manual_seed(int(boxes.keys[row, column]) >> 1)
        size = (len(box), height, width) if mode == "pixel" else (len(box), 1, 1)
        box.copy_(torch.randn(size, generator=source, device=images.device))
    return images
