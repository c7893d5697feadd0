"""Erase random boxes (Zhong et al., 2017), as timm does, by numbers drawn before."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from pipelines.rng import Purpose, key, uniform

_MIN_AREA, _MAX_AREA = 0.02, 1 / 3
_MIN_ASPECT = 0.3
_NUM_TRIES = 10


@dataclass(frozen=True, kw_only=True)
class Boxes:
    """Boxes to erase from each image, one after another.

    All arrays are int64 of shape (n, count), in pixels; where there is no box, heights
    and widths are 0.
    """

    tops: np.ndarray
    lefts: np.ndarray
    heights: np.ndarray
    widths: np.ndarray
    noise_keys: np.ndarray
    """Seeds for the boxes' noise."""


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

    An image is erased with probability `prob`, then in 1 to `count` boxes, all as
    likely. A box's area is uniform in 2 % to a third of the image's, divided by the
    number of boxes; its aspect ratio log-uniform in 0.3 to 1 / 0.3; the first of ten
    tries that is smaller than the image is taken, else none.

    Args:
        draw_ids: Whole numbers of shape (n,).
    """
    shape = (len(draw_ids), count, _NUM_TRIES, 4)
    draws = uniform(
        draw_ids,
        key=key(seed, epoch, Purpose.ERASE),
        num_draws=2 + math.prod(shape[1:]),
    )
    num_boxes = 1 + np.floor(draws[:, 1] * count).astype(np.int64)
    num_boxes = np.where(draws[:, 0] < prob, num_boxes, 0)[:, None]
    area, aspect, top, left = np.moveaxis(draws[:, 2:].reshape(shape), 3, 0)
    area = (_MIN_AREA + area * (_MAX_AREA - _MIN_AREA)) * img_size**2
    area /= np.maximum(num_boxes, 1)[:, :, None]
    aspect = np.exp((2 * aspect - 1) * math.log(1 / _MIN_ASPECT))
    heights = np.rint(np.sqrt(area * aspect)).astype(np.int64)
    widths = np.rint(np.sqrt(area / aspect)).astype(np.int64)
    fits = (heights < img_size) & (widths < img_size)
    is_there = fits.any(axis=2) & (np.arange(count) < num_boxes)
    first = fits.argmax(axis=2)[:, :, None]

    def of_first(values: np.ndarray) -> np.ndarray:
        return np.where(is_there, np.take_along_axis(values, first, axis=2)[:, :, 0], 0)

    noise = uniform(draw_ids, key=key(seed, epoch, Purpose.ERASE, 1), num_draws=count)
    return Boxes(
        tops=of_first(np.floor(top * (img_size - heights + 1)).astype(np.int64)),
        lefts=of_first(np.floor(left * (img_size - widths + 1)).astype(np.int64)),
        heights=of_first(heights),
        widths=of_first(widths),
        noise_keys=(noise * 2**53).astype(np.int64),
    )


def erase(
    images: Tensor, boxes: Boxes, *, mode: Literal["const", "rand", "pixel"]
) -> Tensor:
    """Erase boxes of normalised images, in place.

    A box's noise depends on its key and the kind of device alone: not on the batch, or
    on how the images lie in memory. torch promises a seed's numbers for one version.

    Args:
        images: Floats of shape (B, 3, H, W).
        mode: What boxes hold: const is zeros, the mean colour; rand one normal colour;
            pixel a normal value for each value.

    Returns:
        The images that were given.
    """
    generator = torch.Generator(images.device)
    for at, which in zip(*np.nonzero(boxes.heights * boxes.widths), strict=True):
        height, width = int(boxes.heights[at, which]), int(boxes.widths[at, which])
        top, left = int(boxes.tops[at, which]), int(boxes.lefts[at, which])
        box = images[at, :, top : top + height, left : left + width]
        if mode == "const":
            box.zero_()
            continue
        generator.manual_seed(int(boxes.noise_keys[at, which]))
        shape = (height, width) if mode == "pixel" else (1, 1)
        # Channels last, as images lie in training.
        noise = torch.randn(
            (*shape, len(box)),
            generator=generator,
            device=images.device,
            # Then rounded to the images' type, so that bfloat16 gets the same noise.
            dtype=torch.float32,
        )
        box.copy_(noise.permute(2, 0, 1))
    return images
