"""Compute the heads plainly, with PyTorch's operations and autograd.

`benchmarks.heads` compares ours with these. Each maps tokens (B, N, D), or matrices, to
matrices.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def covariance(x: Tensor) -> Tensor:
    """Compute the covariance of tokens (B, N, D)."""
    x = x - x.mean(dim=1, keepdim=True)
    return x.mT @ x / x.shape[1]


def newton_schulz(x: Tensor, *, num_iterations: int = 5) -> Tensor:
    """Compute the matrix square root by Newton-Schulz, from Y = x / trace, Z = I."""
    trace = x.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]
    eye = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device).expand_as(x)
    y, z = x / trace, eye
    for _ in range(num_iterations):
        t = 0.5 * (3 * eye - z @ y)
        y, z = y @ t, t @ z
    return y * trace.sqrt()


def eigen_power(x: Tensor, *, power: float = 0.5) -> Tensor:
    """Compute a matrix power by `torch.linalg.eigh`, with eigenvalues kept off zero."""
    values, vectors = torch.linalg.eigh(x)
    return (vectors * values.clamp(min=1e-5).pow(power).unsqueeze(-2)) @ vectors.mT


def eigen_log(x: Tensor) -> Tensor:
    """Compute the matrix logarithm, with eigenvalues kept off zero."""
    values, vectors = torch.linalg.eigh(x)
    return (vectors * values.clamp(min=1e-5).log().unsqueeze(-2)) @ vectors.mT


def svpn(
    x: Tensor,
    start: Tensor,
    *,
    power: float = 0.5,
    num_iterations: int = 1,
    num_singular_values: int = 1,
) -> Tensor:
    """Normalise by singular triplets, found in turn on the earlier ones' residual."""
    total = torch.zeros_like(x)
    s = x.new_ones(len(x), 1, 1)
    for _ in range(num_singular_values):
        u = v = start.expand(len(x), -1).unsqueeze(-1)
        for _ in range(num_iterations):
            u = functional.normalize(x @ v, dim=1)
            v = functional.normalize(x.mT @ u, dim=1)
        s = u.mT @ x @ v
        outer = u @ v.mT
        total = total + s**power * outer
        x = x - s * outer
    return total + x / (s ** (1 - power) + 1e-5)


def signed_sqrt(x: Tensor) -> Tensor:
    """Take every element's signed square root, and scale to norm 1."""
    powered = x.sign() * (x.abs() + 1e-8).sqrt()
    return powered / powered.flatten(1).norm(dim=1)[:, None, None].clamp(min=1e-12)
