"""Fit a trunk's position tables to another image size, as timm does when it loads."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from typing import Any

from timm.layers.pos_embed import resample_abs_pos_embed, resample_abs_pos_embed_nhwc
from torch import nn

from sovit.shapes import Tensor

_POSITIONS = re.compile(r"pos(_|$|\.)|(^|[._])rel(ative)?_pos|attention_bias")
Filter = Callable[..., Mapping[str, Any]]


def fit_positions(trunk: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the position tables of a trunk's weights that need another size, fitted.

    By timm's own filter of that trunk's checkpoints: learned tables, and the relative
    ones of windows. A learned table without a filter is resampled as a ViT's. What
    nothing fits is left out: loading names it then, with both sizes.
    """
    own = trunk.state_dict()
    differ = {
        name: tensor
        for name, tensor in state.items()
        if name in own and own[name].shape != tensor.shape and _POSITIONS.search(name)
    }
    if not differ:
        return {}
    filtered = _filtered(trunk, state)
    fitted = dict[str, Tensor]()
    for name, tensor in differ.items():
        table = filtered.get(name, tensor)
        if table.shape != own[name].shape:
            table = _resampled(trunk, table, like=own[name])
        if table.shape == own[name].shape:
            fitted[name] = table
    return fitted


def _filtered(trunk: nn.Module, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    for kind in type(trunk).__mro__:
        module = sys.modules.get(kind.__module__)
        timm_filter: Filter | None = getattr(module, "checkpoint_filter_fn", None)
        if timm_filter is not None:
            try:
                return timm_filter(dict(state), trunk)
            except Exception:  # Made for timm's files: of other weights loading tells.
                return {}
    return {}


def _resampled(trunk: nn.Module, table: Tensor, *, like: Tensor) -> Tensor:
    """Resample a learned table (1, N, C) or (1, H, W, C) of a square grid."""
    if table.ndim == like.ndim == 4 and table.shape[-1] == like.shape[-1]:
        return resample_abs_pos_embed_nhwc(table, new_size=list(like.shape[1:3]))
    grid = getattr(getattr(trunk, "patch_embed", None), "grid_size", None)
    if table.ndim != 3 or like.ndim != 3 or grid is None:
        return table
    prefix = like.shape[1] - grid[0] * grid[1]
    side = round(max(table.shape[1] - prefix, 0) ** 0.5)
    if prefix < 0 or side * side != table.shape[1] - prefix:
        return table
    return resample_abs_pos_embed(table, new_size=list(grid), num_prefix_tokens=prefix)
