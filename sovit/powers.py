"""Exact powers and logarithms of matrices by decomposition, as pure functions.

They are the reference of the fast ways: `sovit.newton_schulz`, `sovit.svpn`.
"""

from __future__ import annotations

from functools import partial

import torch

from sovit.moments import by_smaller_side
from sovit.precision import at_least_float32, autocast_off
from sovit.shapes import Float, Number, Tensor
from sovit.singular import singular_power
from sovit.spectral import Function, spectral

# What the logarithm adds to every eigenvalue, in parts of their mean.
LOG_EPS = 1e-3


def matrix_power(
    x: Float[Tensor, "*batch d d"],
    *,
    power: Number = 0.5,
    placement: str = "auto",
) -> Float[Tensor, "*batch d d"]:
    """Raise the eigenvalues of positive semi-definite matrices to a power, exactly.

    U diag(l^power) U^T, as in MPN-COV (arXiv 1703.08050), whose exponent is 1/2. Any
    exponent goes; eigenvalues that are zero up to rounding stay zero, also for negative
    ones, which gives powers of the pseudo-inverse.

    The gradient is U (K o (U^T G U)) U^T with Loewner's matrix K: the difference
    quotients (l_i^p - l_j^p) / (l_i - l_j), and derivatives p l_i^(p - 1) where the two
    are equal, worked out without cancellation. The papers' code divides by differences
    of eigenvalues instead, and by zero where they repeat. Between two zero eigenvalues
    the quotient is 0, not infinite. It can be differentiated twice: see
    `sovit.spectral`. A matrix with NaN or infinity in it gives NaN.

    Only the symmetric part of `x` counts. Float32 inside, or float64 for float64 input;
    the result keeps that precision. `placement` is where the decomposition happens:
    see `sovit.spectral.symmetric_eig`.
    """
    return spectral(x, Function(float(power)), placement=placement)


def matrix_log(
    x: Float[Tensor, "*batch d d"],
    *,
    eps: Number = LOG_EPS,
    placement: str = "auto",
) -> Float[Tensor, "*batch d d"]:
    """Take the logarithm of positive semi-definite matrices (Log-Euclidean).

    log(x + eps m I) with m the mean eigenvalue of x: a covariance of few tokens has
    eigenvalues of zero, and none may be. They dominate the result, the smaller `eps`
    the more: MPN-COV (arXiv 1703.08050) takes a power, which allows zeros. Gradient as
    in `matrix_power`. A matrix that is zero gives zero.
    """
    if eps <= 0:
        raise ValueError(
            f"eps: expected over 0, got {eps}; it keeps eigenvalues of zero away from "
            f"the logarithm, {LOG_EPS} is the default"
        )
    with autocast_off(x.device.type):
        matrix = at_least_float32(x)
        mean = matrix.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
        eye = torch.eye(x.shape[-1], dtype=matrix.dtype, device=x.device)
        is_empty = (mean <= 0) & mean.isfinite()
        shift = torch.where(is_empty, 1.0, eps * mean)
        # Of the shifted matrix's mean.
        logarithm = Function(None, lowest=float(eps) / (1 + float(eps)))
        logs = spectral(matrix + shift * eye, logarithm, placement=placement)
        return torch.where(is_empty, 0.0, logs)


def covariance_power(
    x: Float[Tensor, "*batch tokens channels"],
    *,
    power: Number = 0.5,
    centering: str = "channel",
    placement: str = "auto",
) -> Float[Tensor, "*batch channels channels"]:
    """Raise the covariance of a token map to a power, exactly.

    The same as `matrix_power` of `sovit.moments.covariance`. Where there are fewer
    tokens N than channels the decomposition is of the N x N Gram matrix of the centred
    tokens X: the power is X^T K^(power - 1) X / N with K = X X^T / N.
    """
    return by_smaller_side(
        x,
        of_covariance=partial(matrix_power, power=power, placement=placement),
        of_gram=partial(matrix_power, power=power - 1, placement=placement),
        centering=centering,
    )


def sv_power(
    x: Float[Tensor, "*batch m n"], *, power: Number = 0.5
) -> Float[Tensor, "*batch m n"]:
    """Raise the singular values of `x` to a power exactly, by decomposition.

    U diag(s^power) V^T with the thin singular value decomposition: the reference of
    `sovit.svpn.svpn`. Values that are zero up to rounding stay zero; derivatives are
    finite there, and where values are equal. It can be differentiated twice. A matrix
    with NaN or infinity in it gives NaN.

    Raises ValueError for a power that is not over 0.
    """
    if power <= 0:
        raise ValueError(
            f"power: expected over 0, got {power}; 0.5 is the papers' value"
        )
    return singular_power(x, power)
