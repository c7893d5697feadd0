"""Apply drawn operations to an image on the CPU: timm's own functions, on Pillow."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image
from timm.data import auto_augment as timm_ops

from pipelines.transforms.color_ops import Op


def apply_ops(
    pixels: np.ndarray,
    *,
    ids: np.ndarray,
    args: np.ndarray,
    bicubic: np.ndarray,
    fill: tuple[int, int, int],
) -> np.ndarray:
    """Apply one image's operations in turn, as timm does with the same numbers.

    Args:
        pixels: uint8 of shape (H, W, 3), with any strides.
        ids: A row of an `Ops`, as `args` and `bicubic`.
        fill: The colour where an operation moved the image away.

    Returns:
        uint8 of shape (H, W, 3), not to be written to: `pixels` itself where all
        operations are the identity.
    """
    if not ids.any():
        return pixels
    image = Image.fromarray(pixels)
    columns = zip(ids.tolist(), args.tolist(), bicubic.tolist(), strict=True)
    for op, arg, is_bicubic in columns:
        image = _apply(image, op, arg, is_bicubic=is_bicubic, fill=fill)
    return np.asarray(image)


def _apply(
    image: Image.Image,
    op: int,
    arg: float,
    *,
    is_bicubic: bool,
    fill: tuple[int, int, int],
) -> Image.Image:
    kinds = Image.Resampling
    moved: dict[str, Any] = {
        "resample": kinds.BICUBIC if is_bicubic else kinds.BILINEAR,
        "fillcolor": fill,
    }
    match op:
        case Op.AUTO_CONTRAST:
            return timm_ops.auto_contrast(image)
        case Op.EQUALIZE:
            return timm_ops.equalize(image)
        case Op.INVERT:
            return timm_ops.invert(image)
        case Op.ROTATE:
            return timm_ops.rotate(image, arg, **moved)
        case Op.POSTERIZE:
            # No bits at all are black; from version 13 on Pillow refuses to do that,
            # so timm's policies at magnitude 10 end there with an error.
            bits = int(arg)
            black = Image.new("RGB", image.size)
            return timm_ops.posterize(image, bits) if bits > 0 else black
        case Op.SOLARIZE:
            return timm_ops.solarize(image, int(arg))
        case Op.SOLARIZE_ADD:
            return timm_ops.solarize_add(image, int(arg))
        case Op.COLOR:
            return timm_ops.color(image, arg)
        case Op.CONTRAST:
            return timm_ops.contrast(image, arg)
        case Op.BRIGHTNESS:
            return timm_ops.brightness(image, arg)
        case Op.SHARPNESS:
            return timm_ops.sharpness(image, arg)
        case Op.SHEAR_X:
            return timm_ops.shear_x(image, arg, **moved)
        case Op.SHEAR_Y:
            return timm_ops.shear_y(image, arg, **moved)
        case Op.TRANSLATE_X:
            return timm_ops.translate_x_rel(image, arg, **moved)
        case Op.TRANSLATE_Y:
            return timm_ops.translate_y_rel(image, arg, **moved)
    return image
