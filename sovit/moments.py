"""Second moments of token maps: covariance and cross-covariance, as pure functions.

Tokens come as the transformer has them, (..., tokens, channels). The mathematics is in
float32 at least, outside autocast, and the result keeps that precision.
"""

from __future__ import annotations

from sovit.precision import at_least_float32, autocast_off, matmul
from sovit.shapes import Float, Tensor

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
        f"centering must be one of {CENTERINGS}, got {centering!r}: "
        "choose 'channel' for a covariance."
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
