"""The fixed position table of So-ViT: one-dimensional sinusoids."""

from __future__ import annotations

import math

import torch
from timm.layers.pos_embed import resample_abs_pos_embed

from sovit.shapes import Float, Tensor

BASE = 10000.0


def sinusoid_table(num_positions: int, dim: int) -> Float[Tensor, "1 p d"]:
    """Compute the fixed position table, (1, num_positions, dim).

    Sine on even channels, cosine on odd ones, wavelengths in a geometric series of base
    10000. Position 0 is the class token and the others number the tokens row by row, so
    rows and columns are not told apart, as in the papers' code.
    """
    if dim % 2:
        raise ValueError(
            f"embed_dim: expected an even number for the sinusoid table, got {dim}; "
            "choose an even one"
        )
    channel = torch.arange(0, dim, 2, dtype=torch.float64)
    frequency = BASE ** (-channel / dim)
    position = torch.arange(num_positions, dtype=torch.float64)
    angle = position[:, None] * frequency
    table = torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)
    return table.float().unsqueeze(0)


def resize_table(
    table: Float[Tensor, "1 p d"], *, grid_size: tuple[int, int]
) -> Float[Tensor, "1 q d"]:
    """Fit a position table with a class token to a grid of (rows, columns) tokens.

    A sinusoid table is computed anew, which is exact. Any other is interpolated, for
    which its own grid must be a square: ValueError where it is not.
    """
    num_positions = grid_size[0] * grid_size[1] + 1
    old_positions, dim = table.shape[-2:]
    if old_positions == num_positions:
        return table
    if dim % 2 == 0:
        sinusoid = sinusoid_table(old_positions, dim).to(table)
        # Tables computed in float32 elsewhere differ from ours by rounding only.
        if torch.allclose(sinusoid, table, rtol=0, atol=1e-3):
            return sinusoid_table(num_positions, dim).to(table)
    side = math.isqrt(old_positions - 1)
    if side * side != old_positions - 1:
        raise ValueError(
            "expected a position table of a square grid and a class token, got "
            f"{old_positions} positions; interpolate it to {num_positions} positions "
            "before loading"
        )
    return resample_abs_pos_embed(
        table, new_size=list(grid_size), old_size=[side, side], num_prefix_tokens=1
    )
