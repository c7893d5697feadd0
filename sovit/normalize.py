"""Normalisations of second-order matrices: powers, and baselines."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from sovit.approximants import (
    APPROXIMANTS,
    approximate_covariance_sqrt,
    approximate_sqrt,
)
from sovit.moments import covariance, shrink
from sovit.newton_schulz import covariance_sqrt, newton_schulz_sqrt
from sovit.pooling_settings import Pooling
from sovit.powers import covariance_power, matrix_log, matrix_power, sv_power
from sovit.precision import at_least_float32, autocast_off
from sovit.shapes import Float, Number, Tensor
from sovit.svpn import svpn

# Calls in a graph of torch.fx, which sees neither shapes nor devices.
for _name in (
    "covariance",
    "covariance_power",
    "covariance_sqrt",
    "matrix_log",
    "matrix_power",
    "newton_schulz_sqrt",
    "shrink",
    "signed_sqrt",
    "sv_power",
    "svpn",
):
    torch.fx.wrap(_name)

# Added to the size of an element before its root is taken, as in the papers' code.
SIGNED_SQRT_EPS = 1e-8


def signed_sqrt(
    x: Float[Tensor, "*batch m n"], *, power: Number = 0.5
) -> Float[Tensor, "*batch m n"]:
    """Raise each element's magnitude to a power, keep its sign, scale to norm 1.

    sign(x) (|x| + 1e-8)^power, then division by the Frobenius norm: the element-wise
    normalisation of bilinear pooling. SoT's code scales along one dimension instead.
    Float32 inside, or float64 for float64 input.
    """
    with autocast_off(x.device.type):
        x = at_least_float32(x)
        powered = x.sign() * (x.abs() + SIGNED_SQRT_EPS) ** power
        return functional.normalize(powered.flatten(-2), dim=-1).view_as(x)


class Normalize(nn.Module):
    """Chosen normalisation of matrices whose last dimension is `dim`.

    A learned start vector is N(0, 1) at first, a learned scale 1 / sqrt(dim), and both,
    like LayerNorm's weights, are shared by all heads and groups.
    """

    start: Tensor | None

    def __init__(self, dim: int, *, pooling: Pooling) -> None:
        super().__init__()
        self.pooling = pooling
        self.scale = dim**-0.5
        if pooling.normalizer == "svpn" and pooling.start == "learned":
            self.start = nn.Parameter(torch.randn(dim))
        elif pooling.normalizer == "svpn":
            self.register_buffer("start", torch.ones(dim), persistent=False)
        else:
            self.start = None
        if pooling.normalizer == "learned_scale":
            self.learned_scale = nn.Parameter(torch.tensor(dim**-0.5))
        elif pooling.normalizer == "layer_norm":
            self.norm = nn.LayerNorm(dim)

    def init_non_persistent_buffers(self) -> None:
        """Compute what no checkpoint stores, after `to_empty`; named as in timm."""
        if self.start is not None and not isinstance(self.start, nn.Parameter):
            self.start.fill_(1)

    def forward(self, x: Float[Tensor, "*batch m n"]) -> Float[Tensor, "*batch m n"]:
        """Return the normalised matrices."""
        pooling, name = self.pooling, self.pooling.normalizer
        if self.start is not None:
            return svpn(
                x,
                self.start,
                power=pooling.power,
                num_iterations=pooling.num_iterations,
                num_singular_values=pooling.num_singular_values,
            )
        if name == "newton_schulz":
            return newton_schulz_sqrt(x, **self._root_settings())
        if name in APPROXIMANTS:
            return approximate_sqrt(x, approximant=name)
        if name == "eigen":
            return matrix_power(x, power=pooling.power)
        if name == "svd":
            return sv_power(x, power=pooling.power)
        if name == "log":
            return matrix_log(x)
        if name == "signed_sqrt":
            return signed_sqrt(x, power=pooling.power)
        if name == "layer_norm":
            return self.norm(x.to(self.norm.weight.dtype))
        if name == "learned_scale":
            return x * self.learned_scale
        return x * self.scale if name == "scale" else x

    def covariance(
        self, x: Float[Tensor, "*batch n d"], *, centering: str
    ) -> Float[Tensor, "*batch d d"]:
        """Return the normalised covariance of tokens, by a shortcut if there is one."""
        pooling = self.pooling
        if pooling.shrinkage:
            # Of full rank, so no shortcut by the tokens' smaller side is left.
            matrix = covariance(x, centering=centering)
            return self.forward(shrink(matrix, shrinkage=pooling.shrinkage))
        if pooling.normalizer == "newton_schulz":
            return covariance_sqrt(x, **self._root_settings(), centering=centering)
        if pooling.normalizer in APPROXIMANTS:
            return approximate_covariance_sqrt(
                x, approximant=pooling.normalizer, centering=centering
            )
        if pooling.normalizer == "eigen":
            return covariance_power(x, power=pooling.power, centering=centering)
        return self.forward(covariance(x, centering=centering))

    def _root_settings(self) -> dict[str, Any]:
        """Return the settings of the iterated root."""
        names = ("num_iterations", "pre_norm", "coefficients", "max_gain")
        return {name: getattr(self.pooling, name) for name in names}
