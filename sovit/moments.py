"""Second moments of token maps: covariances and the Gaussian embedding, as functions.

Tokens come as the transformer has them, (..., tokens, channels). The mathematics is in
float32 at least, outside autocast, and the result keeps that precision.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from sovit.precision import at_least_float32, autocast_off, matmul
from sovit.shapes import Float, Number, Tensor

CENTERINGS = ("channel", "scalar", "none")


def center(
    x: Float[Tensor, "*batch tokens channels"], *, centering: str = "channel"
) -> Float[Tensor, "*batch tokens channels"]:
    """Subtract the mean of a token map.

    "channel" takes each channel's mean over the tokens, which is what a covariance
    means. "scalar" takes one mean over tokens and channels together: the SoT release
    does so (a three-dimensional map goes into a two-dimensional pooling there), and its
    weights need it. "none" leaves the second moment uncentred.
    """
    if centering == "channel":
        return x - x.mean(dim=-2, keepdim=True)
    if centering == "scalar":
        return x - x.mean(dim=(-2, -1), keepdim=True)
    if centering == "none":
        return x
    raise ValueError(
        f"centering: expected one of {CENTERINGS}, got {centering!r}; choose 'channel' "
        "for a covariance"
    )


def cross_covariance(
    x: Float[Tensor, "*batch tokens m"],
    y: Float[Tensor, "*batch tokens n"],
    *,
    centering: str = "channel",
) -> Float[Tensor, "*batch m n"]:
    """Compute the cross-covariance of two token maps, divided by the token count.

    (1/N) X^T Y with both maps centred, as in So-ViT (arXiv 2104.10935), section 3. The
    divisor is N, not N - 1. Returns float32, or float64 for float64 input.
    """
    num_tokens = x.shape[-2]
    with autocast_off(x.device.type):
        x = center(at_least_float32(x), centering=centering)
        y = center(at_least_float32(y), centering=centering)
        return matmul(x.mT, y) / num_tokens


def covariance(
    x: Float[Tensor, "*batch tokens channels"], *, centering: str = "channel"
) -> Float[Tensor, "*batch channels channels"]:
    """Compute the covariance of a token map: symmetric, divided by the token count."""
    return cross_covariance(x, x, centering=centering)


def shrink(
    x: Float[Tensor, "*batch d d"], *, shrinkage: Number
) -> Float[Tensor, "*batch d d"]:
    """Mix a covariance with the identity of its own trace: (1 - l) S + l tr(S)/d I.

    Its trace stays; its eigenvalues are at least l times their mean, so a root's
    gradient is bounded.
    """
    mean = x.diagonal(dim1=-2, dim2=-1).mean(dim=-1)[..., None, None]
    identity = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    return (1 - shrinkage) * x + shrinkage * mean * identity


def by_smaller_side(
    x: Float[Tensor, "*batch tokens channels"],
    *,
    of_covariance: Callable[[Tensor], Tensor],
    of_gram: Callable[[Tensor], Tensor],
    centering: str,
) -> Float[Tensor, "*batch channels channels"]:
    """Apply a function to a token map's covariance, through the smaller of two sides.

    With centred tokens X, of N rows, S = X^T X / N and the Gram matrix K = X X^T / N
    share their eigenvalues but for zeros. So `of_covariance`, f with f(0) = 0, is
    f(S) = X^T g(K) X / N where `of_gram` is g(l) = f(l) / l: that way is taken where
    there are fewer tokens than channels.
    """
    num_tokens, num_channels = x.shape[-2:]
    if num_tokens >= num_channels:
        return of_covariance(covariance(x, centering=centering))
    with autocast_off(x.device.type):
        x = center(at_least_float32(x), centering=centering)
        inner = of_gram(matmul(x, x.mT) / num_tokens)
        return matmul(x.mT, matmul(inner, x)) / num_tokens


def append_one(
    x: Float[Tensor, "*batch tokens channels"],
) -> Float[Tensor, "*batch tokens channels_and_one"]:
    """Append a channel of ones, as the Gaussian embedding needs it."""
    return torch.cat([x, torch.ones_like(x[..., :1])], dim=-1)


def gaussian_embedding(
    x: Float[Tensor, "*batch tokens channels"],
) -> Float[Tensor, "*batch side side"]:
    """Embed the Gaussian of a token map: [[S + m m^T, m], [m^T, 1]].

    m is the mean and S the covariance, divided by the token count: a symmetric positive
    matrix of side channels + 1, whose square root G2DeNet and the global Gaussian
    embedding network (arXiv 1904.06836) use. S + m m^T is the uncentred second moment,
    so the whole is that of the tokens with a one appended.
    """
    return covariance(append_one(at_least_float32(x)), centering="none")


def upper_triangle(x: Float[Tensor, "*batch d d"]) -> Float[Tensor, "*batch k"]:
    """Return the upper triangle with the diagonal, row by row: d (d + 1) / 2 values.

    Nothing is scaled, as in iSQRT-COV's code.
    """
    d = x.shape[-1]
    rows, columns = torch.triu_indices(d, d, device=x.device)
    return x.flatten(-2).index_select(-1, rows * d + columns)
