"""Square roots of symmetric matrices by one polynomial or rational function: MTP, MPA.

Where Newton-Schulz iterates, Song, Sebe and Wang (ICLR 2022, TPAMI 2022) take the
Taylor polynomial of degree 10 of (1 - z)^(1/2) (MTP), or its diagonal Pade approximant
of degree 5 (MPA), at z = I - S / f with f the Frobenius norm.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import partial

import torch

from sovit.moments import center, covariance
from sovit.precision import TINY, at_least_float32, autocast_off, matmul, solve
from sovit.shapes import Float, Tensor

APPROXIMANTS = ("mpa", "mtp")
# Of A = S / f instead of z, in which the coefficients of the paper cancel.
_NUMERATOR = (1.0, 55.0, 330.0, 462.0, 165.0, 11.0)
_DENOMINATOR = (11.0, 165.0, 462.0, 330.0, 55.0, 1.0)
_DEGREE = 10


def approximate_sqrt(
    x: Float[Tensor, "*batch d d"], *, approximant: str = "mpa"
) -> Float[Tensor, "*batch d d"]:
    """Approximate the square root of positive semi-definite matrices.

    sqrt(f) r(x / f) with f the Frobenius norm. "mpa" is the rational function whose
    numerator and denominator are of degree 5: right to 1 % for eigenvalues over
    0.056 f, and never below the root, so that small ones are lifted: zero to
    sqrt(f) / 11. "mtp" is the polynomial of degree 10: right to 1 % over 0.17 f, and
    zero becomes 0.176 sqrt(f).

    The gradient is that of this function, once and again. The paper's is the solution
    of the Lyapunov equation that the true root's gradient solves: of nearly the same
    direction, and another size where eigenvalues are small. Only the symmetric part of
    `x` counts. A matrix that is zero gives zero, NaN and infinity give NaN. Float32
    inside, or float64 for float64 input; the result keeps that precision.

    Raises ValueError for another approximant.
    """
    _check(approximant)
    with autocast_off(x.device.type):
        a, size = _normalized(at_least_float32(x))
        root = _rational(a) if approximant == "mpa" else _taylor(a, _root_terms())
        return root * _root_of(size)


def approximate_covariance_sqrt(
    x: Float[Tensor, "*batch tokens channels"],
    *,
    approximant: str = "mpa",
    centering: str = "channel",
) -> Float[Tensor, "*batch channels channels"]:
    """Approximate the square root of the covariance of a token map.

    The same as `approximate_sqrt` of `sovit.moments.covariance`. Where there are fewer
    tokens N than channels it works on the N x N Gram matrix K of the centred tokens X:
    with r(0) what zero eigenvalues become, the root is sqrt(f) r(0) I + X^T g(K) X / N,
    where g(l) = (r(l / f) - r(0)) sqrt(f) / l.
    """
    _check(approximant)
    num_tokens, num_channels = x.shape[-2:]
    if num_tokens >= num_channels:
        root = partial(approximate_sqrt, approximant=approximant)
        return root(covariance(x, centering=centering))
    with autocast_off(x.device.type):
        x = center(at_least_float32(x), centering=centering)
        a, size = _normalized(matmul(x, x.mT) / num_tokens)
        if approximant == "mpa":
            lowest, inner = _NUMERATOR[0] / _DENOMINATOR[0], _rational(a, is_slope=True)
        else:
            lowest, inner = sum(_root_terms()), _taylor(a, _slope_terms())
        safe = torch.where(size == 0, 1.0, size)
        inner = torch.where(size == 0, 0.0, inner / safe.sqrt())
        eye = torch.eye(num_channels, dtype=x.dtype, device=x.device)
        lifted = lowest * _root_of(size) * eye
        return matmul(x.mT, matmul(inner, x)) / num_tokens + lifted


def _check(approximant: str) -> None:
    if approximant not in APPROXIMANTS:
        raise ValueError(
            f"approximant: expected one of {APPROXIMANTS}, got {approximant!r}; 'mpa' "
            "is the more exact one"
        )


def _normalized(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return A and f (..., 1, 1), 0 for a matrix that counts as zero."""
    x = (x + x.mT) * 0.5
    # By the largest element first: squares of small ones would vanish.
    largest = x.detach().abs().amax(dim=(-2, -1), keepdim=True)
    is_empty = largest <= TINY
    largest = torch.where(is_empty, 1.0, largest)
    x = torch.where(is_empty, 0.0, x / largest)
    # The norm of zeros has no gradient.
    square = x.square().sum(dim=(-2, -1), keepdim=True)
    norm = torch.where(is_empty, 1.0, square).sqrt()
    norm = torch.where(norm.isfinite(), norm, torch.nan)
    return x / norm, torch.where(is_empty, 0.0, norm * largest)


def _root_of(size: Tensor) -> Tensor:
    """Return the root of sizes, 0 with zero gradient for 0."""
    root = torch.where(size == 0, 1.0, size).sqrt()
    return torch.where(size == 0, 0.0, root)


def _rational(a: Tensor, *, is_slope: bool = False) -> Tensor:
    """Return r(A), or (r(A) - r(0)) / A, by a linear solve.

    The denominator's eigenvalues are between 11 and 1024: it has an inverse.
    """
    eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    second = _square(a)
    third, fourth = matmul(second, a), _square(second)
    powers = [eye, a, second, third, fourth, matmul(fourth, a)]
    above = _NUMERATOR
    if is_slope:
        ratio = _NUMERATOR[0] / _DENOMINATOR[0]
        pairs = zip(_NUMERATOR, _DENOMINATOR, strict=True)
        above = tuple(n - ratio * d for n, d in pairs)[1:]
    # Scaled, so that neither is larger than 1.
    scale = 1 / sum(_DENOMINATOR)
    denominator = _sum(powers, [scale * term for term in _DENOMINATOR])
    numerator = _sum(powers, [scale * term for term in above])
    return solve(denominator, numerator)


def _square(x: Tensor) -> Tensor:
    """Return the square of symmetric matrices."""
    # The transpose, since torch.compile takes no tensor twice in one function of ours.
    return matmul(x, x.mT)


def _sum(powers: Sequence[Tensor], terms: Sequence[float]) -> Tensor:
    first, *rest = (term * power for term, power in zip(terms, powers, strict=False))
    return sum(rest, start=first)


def _root_terms() -> tuple[float, ...]:
    """Return the coefficients of (1 - z)^(1/2), from the constant one on."""
    ratios = ((k - 1.5) / k for k in range(1, _DEGREE + 1))
    return tuple(
        itertools.accumulate(ratios, lambda term, ratio: term * ratio, initial=1.0)
    )


def _slope_terms() -> tuple[float, ...]:
    """Return those of (p(z) - p(1)) / (1 - z), p the polynomial of the root's."""
    terms = _root_terms()
    return tuple(-sum(terms[k + 1 :]) for k in range(_DEGREE))


def _taylor(a: Tensor, terms: Sequence[float]) -> Tensor:
    """Return the polynomial of z = I - A by five products."""
    eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    eye = eye.expand_as(a)
    z = eye - a
    second = _square(z)
    third = matmul(second, z)
    parts = [terms[k : k + 3] for k in range(0, len(terms), 3)]
    value = _sum([eye, z, second], parts[-1])
    for part in reversed(parts[:-1]):
        value = matmul(value, third) + _sum([eye, z, second], part)
    return value
