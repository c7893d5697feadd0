"""Exact powers and logarithms of matrices by decomposition, as pure functions.

They are the reference of the fast ways: `sovit.newton_schulz`, `sovit.svpn`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from sovit.moments import by_smaller_side
from sovit.precision import at_least_float32, autocast_off, matmul
from sovit.shapes import Float, Number, Tensor

# What the logarithm adds to every eigenvalue, in parts of their mean.
LOG_EPS = 1e-3


def matrix_power(
    x: Float[Tensor, "*batch d d"], *, power: Number = 0.5
) -> Float[Tensor, "*batch d d"]:
    """Raise the eigenvalues of positive semi-definite matrices to a power, exactly.

    U diag(l^power) U^T, as in MPN-COV (arXiv 1703.08050), whose exponent is 1/2. Any
    exponent goes; eigenvalues that are zero up to rounding stay zero, also for negative
    ones, which gives powers of the pseudo-inverse.

    The gradient is U (K o (U^T G U)) U^T with Loewner's matrix K: the difference
    quotients (l_i^p - l_j^p) / (l_i - l_j), and derivatives p l_i^(p - 1) where the two
    are equal, worked out without cancellation. The papers' code divides by differences
    of eigenvalues instead, and by zero where they repeat. Between two zero eigenvalues
    the quotient is 0, not infinite. It can be differentiated once.

    Only the symmetric part of `x` counts. Float32 inside, or float64 for float64 input;
    the result keeps that precision.
    """
    return _spectral(x, float(power))


def matrix_log(
    x: Float[Tensor, "*batch d d"], *, eps: Number = LOG_EPS
) -> Float[Tensor, "*batch d d"]:
    """Take the logarithm of positive semi-definite matrices (Log-Euclidean).

    log(x + eps m I) with m the mean eigenvalue of x: a covariance of few tokens has
    eigenvalues of zero, and none may be. They dominate the result, the smaller `eps`
    the more: MPN-COV (arXiv 1703.08050) takes a power, which allows zeros. Gradient as
    in `matrix_power`. A matrix that is zero gives zero.
    """
    if eps <= 0:
        raise ValueError(
            f"eps must be over 0, got {eps}: it keeps eigenvalues of zero away from "
            f"the logarithm, {LOG_EPS} is the default."
        )
    with autocast_off(x.device.type):
        matrix = at_least_float32(x)
        mean = matrix.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
        eye = torch.eye(x.shape[-1], dtype=matrix.dtype, device=x.device)
        positive = mean > 0
        shift = torch.where(positive, eps * mean, 1.0)
        return torch.where(positive, _spectral(matrix + shift * eye, None), 0.0)


def covariance_power(
    x: Float[Tensor, "*batch tokens channels"],
    *,
    power: Number = 0.5,
    centering: str = "channel",
) -> Float[Tensor, "*batch channels channels"]:
    """Raise the covariance of a token map to a power, exactly.

    The same as `matrix_power` of `sovit.moments.covariance`. Where there are fewer
    tokens N than channels the decomposition is of the N x N Gram matrix of the centred
    tokens X: the power is X^T K^(power - 1) X / N with K = X X^T / N.
    """
    return by_smaller_side(
        x,
        of_covariance=partial(matrix_power, power=power),
        of_gram=partial(matrix_power, power=power - 1),
        centering=centering,
    )


def sv_power(
    x: Float[Tensor, "*batch m n"], *, power: Number = 0.5
) -> Float[Tensor, "*batch m n"]:
    """Raise the singular values of `x` to a power exactly, by decomposition.

    U diag(s^power) V^T with the thin singular value decomposition: the reference of
    `sovit.svpn.svpn`. Its gradient needs singular values that differ, as
    `torch.linalg.svd` says. Raises ValueError for a power that is not over 0.
    """
    if power <= 0:
        raise ValueError(
            f"power must be over 0, got {power}: 0.5 is the papers' value."
        )
    with autocast_off(x.device.type):
        u, s, vh = torch.linalg.svd(at_least_float32(x), full_matrices=False)
        positive = s > 0
        powered = torch.where(positive, torch.where(positive, s, 1.0) ** power, 0.0)
        return matmul(u * powered.unsqueeze(-2), vh)


def _spectral(x: Tensor, power: float | None) -> Tensor:
    """Apply a power, or the logarithm for None, to the eigenvalues."""
    with autocast_off(x.device.type):
        result, *_ = _Spectral.apply(at_least_float32(x), power)  # pyright: ignore
        return result


class _Spectral(torch.autograd.Function):
    """Apply a function to eigenvalues, with Loewner's matrix in the gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, power: float | None) -> tuple[Tensor, Tensor, Tensor]:
        values, vectors = torch.linalg.eigh((x + x.mT) / 2)
        floor = values[..., -1:] * x.shape[-1] * torch.finfo(x.dtype).eps
        values = torch.where(values > floor.clamp(min=0), values, 0.0)
        positive = torch.where(values > 0, values, 1.0)
        applied = positive.log() if power is None else positive**power
        applied = torch.where(values > 0, applied, 0.0)
        result = (vectors * applied.unsqueeze(-2)) @ vectors.mT
        return result, values, vectors

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _, ctx.power = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*output[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor | None, *_: None
    ) -> tuple[Tensor | None, None]:
        if grad is None:
            return None, None
        values, vectors = ctx.saved_tensors
        with autocast_off(values.device.type):
            grad = (grad + grad.mT) / 2
            inner = vectors.mT @ grad @ vectors
            inner = inner * _loewner(values, ctx.power)
            return vectors @ inner @ vectors.mT, None


def _loewner(values: Float[Tensor, "*batch d"], power: float | None) -> Tensor:
    """Return the difference quotients of all pairs of eigenvalues, (*batch, d, d).

    With the larger value a and the smaller a (1 - g) the quotient of a power p is
    a^(p - 1) (1 - (1 - g)^p) / g, exact however small the gap g is.
    """
    one, other = values.unsqueeze(-1), values.unsqueeze(-2)
    large, small = torch.maximum(one, other), torch.minimum(one, other)
    some, both = large > 0, small > 0
    safe = torch.where(some, large, 1.0)
    gap = (safe - small) / safe
    equal = gap == 0
    gap = torch.where(both & ~equal, gap, 0.5)
    if power is None:
        scale, limit, lone = 1 / safe, 1.0, safe.log()
        quotient = -torch.log1p(-gap) / gap
    else:
        scale, limit, lone = safe ** (power - 1), power, torch.ones_like(safe)
        quotient = -torch.expm1(power * torch.log1p(-gap)) / gap
    quotient = torch.where(equal, limit, torch.where(both, quotient, lone))
    return torch.where(some, scale * quotient, 0.0)
