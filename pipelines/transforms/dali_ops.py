"""Apply drawn operations within a DALI pipeline, on the CPU or on a GPU.

Pixels are those of `pillow_ops` but for roundings; the functions say where they differ.
DALI's own `auto_aug` has torchvision's operations and draws by itself.

An `if` on a node splits a batch, so each image goes through its own operation only.
DALI rewrites this file's functions for that, where the pipeline is defined through
`pipeline_def(..., enable_conditionals=True)`.
"""

from __future__ import annotations

from enum import Enum
from typing import Any

import numpy as np
import nvidia.dali.fn as fn
import nvidia.dali.types as types

from pipelines.transforms.color_ops import Op, Ops

_BOOL, _UINT8 = types.DALIDataType.BOOL, types.DALIDataType.UINT8
_INT32, _FLOAT = types.DALIDataType.INT32, types.DALIDataType.FLOAT
_SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13
# Pillow cuts fractions off where DALI rounds. Almost a half, since DALI's floats may
# come out a little below a whole number that is exact in Pillow.
_CUT = 0.499


class _Kind(Enum):
    """Groups of operations that share a branch."""

    MOVE = (Op.ROTATE, Op.SHEAR_X, Op.SHEAR_Y, Op.TRANSLATE_X, Op.TRANSLATE_Y)
    ENHANCE = (Op.COLOR, Op.CONTRAST, Op.BRIGHTNESS, Op.SHARPNESS)
    REMAP = (Op.INVERT, Op.POSTERIZE, Op.SOLARIZE, Op.SOLARIZE_ADD)
    STRETCH = (Op.AUTO_CONTRAST, Op.EQUALIZE)


def op_inputs(ops: Ops, *, img_size: int) -> dict[str, np.ndarray]:
    """Return the arrays to feed to the inputs of `apply_ops`, by name.

    They are computed here since an operator of DALI on single numbers takes as long
    for each as NumPy takes for all of them.
    """
    # Nothing is as light as that; and it is no uint8.
    never = (ops.ids == Op.SOLARIZE) & (ops.args > 255)
    ids = np.where(never, Op.IDENTITY, ops.ids)
    kinds = [np.isin(ids, kind.value) for kind in _Kind]
    return {
        "op_kinds": np.stack(kinds, axis=2),
        "op_ids": ids.astype(np.int32),
        "op_matrices": _matrices(ops, img_size=img_size).astype(np.float32),
        "op_factors": ops.args.astype(np.float32),
        "op_levels": _levels(ops),
    }


def _matrices(ops: Ops, *, img_size: int) -> np.ndarray:
    """Return inverse affine maps, each place to its source: (n, k, 2, 3), in pixels."""
    arg = {op: np.where(ops.ids == op, ops.args, 0.0) for op in _Kind.MOVE.value}
    angle = np.deg2rad(arg[Op.ROTATE])
    cosine, sine = np.cos(angle), np.sin(angle)
    right, down = arg[Op.SHEAR_X] - sine, arg[Op.SHEAR_Y] + sine
    # Rotated about the image's centre.
    half = img_size / 2
    left = arg[Op.TRANSLATE_X] * img_size + half * (1 - cosine + sine)
    top = arg[Op.TRANSLATE_Y] * img_size + half * (1 - cosine - sine)
    both = np.stack([cosine, right, left, down, cosine, top], axis=2)
    return both.reshape(*ops.ids.shape, 2, 3)


def _levels(ops: Ops) -> np.ndarray:
    """Return uint8: POSTERIZE's mask, SOLARIZE_ADD's addend, SOLARIZE's threshold."""
    is_posterize = ops.ids == Op.POSTERIZE
    masks = 256 - 2.0 ** (8 - np.where(is_posterize, ops.args, 8))
    return np.clip(np.where(is_posterize, masks, ops.args), 0, 255).astype(np.uint8)


def apply_ops(
    images: Any, *, num_columns: int, img_size: int, fill: tuple[int, int, int]
) -> Any:
    """Apply each image's operations in turn.

    Args:
        images: uint8 of shape (img_size, img_size, 3) each, on the CPU or a GPU.
        num_columns: Operations for an image.
        fill: The colour where an operation moved the image away.
    """
    kinds: Any = fn.external_source(name="op_kinds", dtype=_BOOL, ndim=2)
    ids: Any = fn.external_source(name="op_ids", dtype=_INT32, ndim=1)
    matrices: Any = fn.external_source(name="op_matrices", dtype=_FLOAT, ndim=3)
    factors: Any = fn.external_source(name="op_factors", dtype=_FLOAT, ndim=1)
    levels: Any = fn.external_source(name="op_levels", dtype=_UINT8, ndim=1)
    for column in range(num_columns):
        op = ids[column]
        is_of: dict[_Kind, Any] = {
            kind: kinds[column, at] for at, kind in enumerate(_Kind)
        }
        # One after another, not else: a nested branch splits all that it reads again.
        if is_of[_Kind.MOVE]:
            images = _move(images, matrix=matrices[column], fill=fill)
        if is_of[_Kind.ENHANCE]:
            images = _enhance(images, op=op, factor=factors[column], img_size=img_size)
        if is_of[_Kind.REMAP]:
            images = _remap(images, op=op, level=levels[column])
        if is_of[_Kind.STRETCH]:
            images = _stretch(images, op=op)
    return images


def _move(images: Any, *, matrix: Any, fill: tuple[int, int, int]) -> Any:
    """Move pixels, bilinearly: DALI has no bicubic warp, which timm may draw."""
    moved: Any = fn.warp_affine(images, matrix=matrix, dtype=_FLOAT)
    moved = fn.cast(moved - _CUT, dtype=_UINT8)
    # In Pillow the border reaches half a pixel out, and there the fill begins at once.
    # DALI's own fill is one level for all channels, and blended into the border.
    inside = fn.warp_affine(
        images[:, :, 0:1] | types.Constant(255).uint8(),
        matrix=matrix,
        fill_value=0,
        interp_type=types.DALIInterpType.INTERP_NN,
    )
    color = types.Constant(np.array(fill, np.uint8))
    return ((moved ^ color) & inside) ^ color


def _enhance(images: Any, *, op: Any, factor: Any, img_size: int) -> Any:
    """Blend with what the image is at factor 0, as Pillow's ImageEnhance."""
    # Each by itself: DALI 2.4 adds wrongly where a batch holds samples that are all
    # broadcast, of shape (1, 1, 1), beside samples that are not.
    if op == int(Op.SHARPNESS):
        images = _blend(images, _smooth(images, img_size=img_size), factor=factor)
    elif op == int(Op.BRIGHTNESS):
        images = fn.cast(images * factor - _CUT, dtype=_UINT8)
    else:
        grey = fn.color_space_conversion(
            images,
            image_type=types.DALIImageType.RGB,
            output_type=types.DALIImageType.GRAY,
        )
        if op == int(Op.CONTRAST):
            mean = fn.reductions.mean(grey, axis_names="HW", keep_dims=True)
            images = _blend(images, fn.cast(mean, dtype=_UINT8), factor=factor)
        else:
            images = _blend(images, grey, factor=factor)
    return images


def _blend(images: Any, least: Any, *, factor: Any) -> Any:
    return fn.cast(images * factor + (least * (1 - factor) - _CUT), dtype=_UINT8)


def _smooth(images: Any, *, img_size: int) -> Any:
    """Smooth all but the outermost pixels, which Pillow leaves as they are."""
    kernel: Any = types.Constant(_SMOOTH, device=images.device)
    change = fn.filter(images, kernel, mode="valid") ^ images[1:-1, 1:-1]
    return images ^ fn.slice(
        change,
        start=[-1, -1],
        shape=[img_size, img_size],
        axes=[0, 1],
        out_of_bounds_policy="pad",
    )


def _remap(images: Any, *, op: Any, level: Any) -> Any:
    """Invert, posterize, solarize or add: exactly as Pillow."""
    if op == int(Op.POSTERIZE):
        images = images & level
    elif op == int(Op.SOLARIZE_ADD):
        images = images + level * (images < 128)
    else:
        # Inverting is solarizing from level 0 on, and 0 is its argument.
        images = images ^ ((images >= level) * types.Constant(255).uint8())
    return images


def _stretch(images: Any, *, op: Any) -> Any:
    """Equalize each channel's histogram, or stretch it.

    Equalizing, DALI counts a level itself among those up to it, as OpenCV; Pillow does
    not. On the inverted image the two come to the same, but Pillow divides by a whole
    number: up to two levels apart, and 0.4 in the mean.
    """
    if op == int(Op.EQUALIZE):
        most = types.Constant(255).uint8()
        equal: Any = fn.equalize(images ^ most)
        images = equal ^ most
    else:
        images = _auto_contrast(images)
    return images


def _auto_contrast(images: Any) -> Any:
    """Stretch each channel to all levels; a channel of one level stays."""
    low: Any = fn.reductions.min(images, axis_names="HW", keep_dims=True)
    high: Any = fn.reductions.max(images, axis_names="HW", keep_dims=True)
    is_flat = high == low
    scale = 255.0 / (high - low + is_flat * types.Constant(255).uint8())
    low = low * (high > low)
    return fn.cast(images * scale - (low * scale + _CUT), dtype=_UINT8)
