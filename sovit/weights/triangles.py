"""Triangle of a covariance that a released classifier takes, and its columns' order."""

from __future__ import annotations

import torch
from torch import nn

from sovit.architectures.backbones import SecondOrderNet
from sovit.pooling import CovPool
from sovit.shapes import Float, Tensor
from sovit.weights.releases import Release, side_of_triangle

TRIANGLES = ("upper", "lower")


def find_triangle(
    triangle: str | None, *, release: Release, model: nn.Module
) -> str | None:
    """Return the triangle that a file's classifier takes; None where there is none."""
    if triangle is not None and triangle not in TRIANGLES:
        raise ValueError(
            f"triangle: expected one of {TRIANGLES} or None, got {triangle!r}; None "
            "takes what the authors' code has"
        )
    pool = model.head.pool if isinstance(model, SecondOrderNet) else None
    if isinstance(pool, CovPool) and release.triangle:
        return triangle or release.triangle
    if triangle is not None:
        raise ValueError(
            f"triangle={triangle!r}: expected a classifier on the triangle of a "
            f"covariance, got {release.title}, which has none; leave it out"
        )
    return None


def reorder_triangle(weights: dict[str, Tensor], *, model: nn.Module) -> None:
    """Reorder the columns of a layer on the lower triangle to match the upper one.

    Row by row, the lower triangle has element (i, j) at i (i + 1) / 2 + j. The matrix
    is symmetric: our element (j, i) is the same.
    """
    assert isinstance(model, SecondOrderNet)
    pool = model.head.pool
    assert isinstance(pool, CovPool)
    name = "hidden.0.weight" if len(model.hidden) else "head.fc_visual.weight"
    weight = weights.get(name)
    if weight is not None and weight.shape[1:] == (pool.num_features,):
        num_groups = pool.pooling.num_groups
        weights[name] = _from_lower(weight, num_groups=num_groups)


def _from_lower(
    weight: Float[Tensor, "k f"], *, num_groups: int
) -> Float[Tensor, "k f"]:
    by_group = weight.unflatten(1, (num_groups, -1))
    side = side_of_triangle(by_group.shape[-1])
    assert side is not None
    rows, columns = torch.triu_indices(side, side, device=weight.device)
    return by_group[..., columns * (columns + 1) // 2 + rows].flatten(1)
