"""Build matrices and references for the tests of the mathematics."""

from __future__ import annotations

from collections.abc import Callable, Sequence

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
    """Compute the Newton-Schulz root of one matrix, literally as defined."""
    return coupled(x, steps=((1.5, -0.5),) * num_iterations, pre_norm=pre_norm)[0]


def coupled(
    x: Tensor, *, steps: Sequence[tuple[float, float]], pre_norm: str = "trace"
) -> tuple[Tensor, Tensor]:
    """Compute the root of one matrix and its inverse by the coupled iteration."""
    size = {
        "trace": torch.trace,
        "frobenius": torch.linalg.matrix_norm,
        "s4": lambda x: torch.trace(x @ x @ x @ x) ** 0.25,
    }[pre_norm](x)
    eye = torch.eye(len(x), dtype=x.dtype)
    y, z = x / size, eye
    for a, b in steps:
        t = a * eye + b * z @ y
        y, z = y @ t, t @ z
    return y * size.sqrt(), z / size.sqrt()


def spectral(x: Tensor, *, power: float) -> Tensor:
    """Compute a power of a symmetric matrix by its eigenvalues, zeros left out."""
    values, vectors = torch.linalg.eigh(x)
    kept = values > 1e-10
    powered = torch.where(kept, torch.where(kept, values, 1.0) ** power, 0.0)
    return (vectors * powered.unsqueeze(-2)) @ vectors.mT


def check_autocast(
    function: Callable[[Tensor], Tensor], x: Tensor, *, backward_inside: bool
) -> None:
    """Check that a function's float32 values and gradients are the same under autocast.

    `backward_inside` calls `backward()` under autocast, too.
    """
    x = x.float().requires_grad_()
    wanted = function(x)
    (wanted_grad,) = torch.autograd.grad(wanted.square().sum(), x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = function(x)
        loss = got.square().sum()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=backward_inside):
        (grad,) = torch.autograd.grad(loss, x)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, wanted, rtol=0, atol=0)
    torch.testing.assert_close(grad, wanted_grad, rtol=1e-5, atol=1e-6)
