"""Draw RandAugment and colour jitter as numbers, without touching pixels.

`pillow_ops` and `dali_ops` apply them. What a sample draws depends on (seed, epoch, its
draw id) alone: not on the batch, the order or the worker.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Literal

import numpy as np

from pipelines.config import RandAugment
from pipelines.rng import Purpose, key, uniform


class Op(IntEnum):
    """Operation on an image: identity, then timm's 15 in timm's order.

    Their arguments, and in `pillow_ops` what they do: degrees for ROTATE;
    bits that are kept for POSTERIZE; the least level that is inverted for SOLARIZE;
    levels that are added for SOLARIZE_ADD; for COLOR, CONTRAST, BRIGHTNESS and
    SHARPNESS a factor, 1 for no change; pixels a pixel for shears; a share of the side
    for translations. The others have no argument, and their value is 0.
    """

    IDENTITY = 0
    AUTO_CONTRAST = 1
    EQUALIZE = 2
    INVERT = 3
    ROTATE = 4
    POSTERIZE = 5
    SOLARIZE = 6
    SOLARIZE_ADD = 7
    COLOR = 8
    CONTRAST = 9
    BRIGHTNESS = 10
    SHARPNESS = 11
    SHEAR_X = 12
    SHEAR_Y = 13
    TRANSLATE_X = 14
    TRANSLATE_Y = 15


@dataclass(frozen=True, kw_only=True)
class Ops:
    """Operations that each image of a batch goes through, column by column.

    All arrays are of shape (n, k).
    """

    ids: np.ndarray
    """int64: members of `Op`."""
    args: np.ndarray
    """float64."""
    bicubic: np.ndarray
    """bool: whether moved pixels are interpolated bicubically, else bilinearly."""

    def texts(self) -> list[str]:
        """Name each image's operations with their arguments, a line each."""
        return [
            "\n".join(
                f"{Op(op).name.lower()} {arg:.2g}" if arg else Op(op).name.lower()
                for op, arg in zip(ids, args, strict=True)
                if op
            )
            for ids, args in zip(self.ids.tolist(), self.args.tolist(), strict=True)
        ]


_ENHANCE = (Op.COLOR, Op.CONTRAST, Op.BRIGHTNESS, Op.SHARPNESS)
_JITTER = (Op.BRIGHTNESS, Op.CONTRAST, Op.COLOR)


def rand_augment(
    draw_ids: np.ndarray,
    *,
    policy: RandAugment,
    seed: int,
    epoch: int,
    interpolation: Literal["bilinear", "bicubic", "random"],
) -> Ops:
    """Draw operations as timm's RandAugment does (Cubuk et al., 2020).

    Each of the policy's layers takes one of 15 operations, all as likely, and applies
    it with the policy's probability, with a magnitude and a sign of its own. The first
    layers of a longer policy are those of a shorter one.

    Args:
        draw_ids: Whole numbers of shape (n,).
        interpolation: random tosses a coin for each operation.
    """
    shape = (len(draw_ids), policy.num_layers, 6)
    draws = uniform(
        draw_ids,
        key=key(seed, epoch, Purpose.RANDAUGMENT),
        num_draws=policy.num_layers * shape[2],
    ).reshape(shape)
    choice, applied, radius, angle, sign, coin = np.moveaxis(draws, 2, 0)
    ids = 1 + np.floor(choice * (len(Op) - 1)).astype(np.int64)
    ids = np.where(applied < policy.prob, ids, Op.IDENTITY)
    magnitude = _magnitudes(radius, angle, policy=policy)
    sign = np.where(sign < 0.5, -1.0, 1.0)
    share = {"bilinear": 0.0, "random": 0.5, "bicubic": 1.0}[interpolation]
    args = _args(ids, magnitude / 10, sign=sign, increasing=policy.increasing)
    return Ops(ids=ids, args=args, bicubic=coin < share)


def _magnitudes(
    radius: np.ndarray, angle: np.ndarray, *, policy: RandAugment
) -> np.ndarray:
    """Draw magnitudes out of two uniform numbers each (Box and Muller, 1958)."""
    if np.isinf(policy.magnitude_std):
        magnitude = radius * policy.magnitude
    else:
        normal = np.sqrt(-2 * np.log1p(-radius)) * np.cos(2 * np.pi * angle)
        magnitude = policy.magnitude + policy.magnitude_std * normal
    return np.clip(magnitude, 0, policy.magnitude_max)


def _args(
    ids: np.ndarray, level: np.ndarray, *, sign: np.ndarray, increasing: bool
) -> np.ndarray:
    """Turn levels, 1 at magnitude 10, into arguments by timm's formulas."""
    bits = np.trunc(level * 4)
    threshold = np.minimum(np.trunc(level * 256), 256)
    factor = level * 1.8 + 0.1
    if increasing:
        bits, threshold = 4 - bits, 256 - threshold
        factor = np.maximum(1 + sign * (level * 0.9), 0.1)
    by_op = {
        Op.ROTATE: sign * (level * 30),
        Op.POSTERIZE: bits,
        Op.SOLARIZE: threshold,
        Op.SOLARIZE_ADD: np.minimum(np.trunc(level * 110), 128),
        **dict.fromkeys(_ENHANCE, factor),
        **dict.fromkeys((Op.SHEAR_X, Op.SHEAR_Y), sign * (level * 0.3)),
        **dict.fromkeys((Op.TRANSLATE_X, Op.TRANSLATE_Y), sign * (level * 0.45)),
    }
    args = np.zeros(ids.shape)
    for op, values in by_op.items():
        np.copyto(args, values, where=ids == op)
    return args


def color_jitter(
    draw_ids: np.ndarray, *, strength: float, seed: int, epoch: int
) -> Ops:
    """Draw changes of brightness, contrast and colour, in a random order.

    As torchvision's ColorJitter without hue, which timm's `color_jitter` names: each
    factor is uniform from 1 - strength, at least 0, to 1 + strength.

    Args:
        draw_ids: Whole numbers of shape (n,).
    """
    draws = uniform(draw_ids, key=key(seed, epoch, Purpose.JITTER), num_draws=6)
    order = np.argsort(draws[:, :3], axis=1)
    low = max(0.0, 1 - strength)
    factors = low + draws[:, 3:] * (1 + strength - low)
    return Ops(
        ids=np.array(_JITTER, dtype=np.int64)[order],
        args=np.take_along_axis(factors, order, axis=1),
        bicubic=np.zeros(order.shape, dtype=bool),
    )
