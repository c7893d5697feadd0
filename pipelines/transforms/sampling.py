"""Draw all randomness of a batch's pixels as numbers, without touching pixels.

What a sample draws depends on (seed, epoch, sample, repetition) alone: not on the
batch, the worker, the order, or on how often a run was stopped.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from pipelines.config import Exif, PixelSettings
from pipelines.transforms.color_ops import Ops, color_jitter, rand_augment
from pipelines.transforms.crops import Geometry, center_crop, random_resized_crop
from pipelines.transforms.erasing import Boxes, erase_boxes
from pipelines.transforms.pillow_decode import is_lying, orientation_of
from pipelines.transforms.rows import DRAW_STRIDE, Rows

T = TypeVar("T", Geometry, Ops, Boxes)


@dataclass(frozen=True, kw_only=True)
class Draws:
    """Random draws for some images."""

    geometry: Geometry
    ops: Ops | None
    """None where no image is changed beyond its geometry."""
    boxes: Boxes | None
    """None where nothing is erased."""

    def take(self, places: list[int]) -> Draws:
        """Return the draws of some of the images."""
        return Draws(
            geometry=_take(self.geometry, places),
            ops=None if self.ops is None else _take(self.ops, places),
            boxes=None if self.boxes is None else _take(self.boxes, places),
        )


def _take(arrays: T, places: list[int]) -> T:
    found = {name: value[places] for name, value in vars(arrays).items()}
    return dataclasses.replace(arrays, **found)


def draw_ids_of(rows: Rows) -> np.ndarray:
    """Number every image and repetition: int64 (n,)."""
    return rows.repeats * DRAW_STRIDE + rows.ids


def draw(rows: Rows, *, settings: PixelSettings, epoch: int) -> Draws:
    """Draw the numbers of training, or return evaluation's fixed windows."""
    data, augment = settings.data, settings.augment
    heights, widths = _shown_sizes(rows, exif=data.exif)
    if not settings.train:
        geometry = center_crop(
            heights=heights,
            widths=widths,
            img_size=settings.img_size,
            crop_pct=data.crop_pct,
            interpolation=data.eval_interpolation,
        )
        return Draws(geometry=geometry, ops=None, boxes=None)
    ids = draw_ids_of(rows)
    geometry = random_resized_crop(
        ids,
        heights=heights,
        widths=widths,
        seed=settings.seed,
        epoch=epoch,
        img_size=settings.img_size,
        scale=augment.crop_scale,
        ratio=augment.crop_ratio,
        hflip=augment.hflip,
        interpolation=augment.interpolation,
    )
    return Draws(
        geometry=geometry,
        ops=_draw_ops(ids, settings=settings, epoch=epoch),
        boxes=_draw_boxes(ids, settings=settings, epoch=epoch),
    )


def _shown_sizes(rows: Rows, *, exif: Exif) -> tuple[np.ndarray, np.ndarray]:
    """Return heights and widths as images are decoded: shards have those stored."""
    if exif == "ignore" or rows.reasons is not None:  # or decoded by the readers
        return rows.heights, rows.widths
    lies = np.array([is_lying(orientation_of(v.data)) for v in rows.views], dtype=bool)
    return (
        np.where(lies, rows.widths, rows.heights),
        np.where(lies, rows.heights, rows.widths),
    )


def _draw_ops(ids: np.ndarray, *, settings: PixelSettings, epoch: int) -> Ops | None:
    augment, seed = settings.augment, settings.seed
    policy = augment.rand_augment
    if policy is not None:
        return rand_augment(
            ids,
            policy=policy,
            seed=seed,
            epoch=epoch,
            interpolation=augment.interpolation,
        )
    if augment.color_jitter:
        return color_jitter(ids, strength=augment.color_jitter, seed=seed, epoch=epoch)
    return None


def _draw_boxes(
    ids: np.ndarray, *, settings: PixelSettings, epoch: int
) -> Boxes | None:
    augment = settings.augment
    if not augment.re_prob:
        return None
    return erase_boxes(
        ids,
        prob=augment.re_prob,
        count=augment.re_count,
        img_size=settings.img_size,
        seed=settings.seed,
        epoch=epoch,
    )
