"""Matrices and references that the tests of the mathematics share."""

from __future__ import annotations

import torch
from torch import Tensor


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Draw normal numbers, the same in every precision."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def semidefinite(
    *batch: int, dim: int, rank: int, seed: int = 0, dtype: torch.dtype = torch.float64
) -> Tensor:
    """Draw positive semi-definite matrices of a rank."""
    x = normal(*batch, rank, dim, seed=seed)
    return (x.mT @ x / rank).to(dtype)


def polynomial(x: Tensor, *, num_iterations: int, pre_norm: str = "trace") -> Tensor:
    """Return the Newton-Schulz root of one matrix, word by word as it is defined."""
    size = x.trace() if pre_norm == "trace" else torch.linalg.matrix_norm(x)
    eye = torch.eye(len(x), dtype=x.dtype)
    y, z = x / size, eye
    for _ in range(num_iterations):
        t = (3 * eye - z @ y) / 2
        y, z = y @ t, t @ z
    return y * size.sqrt()


def spectral(x: Tensor, *, power: float) -> Tensor:
    """Return a power of a symmetric matrix by its eigenvalues, zeros left out."""
    values, vectors = torch.linalg.eigh(x)
    kept = values > 1e-10
    powered = torch.where(kept, torch.where(kept, values, 1.0) ** power, 0.0)
    return (vectors * powered.unsqueeze(-2)) @ vectors.mT
