"""What is no number comes out as none, forward and backward, at every size."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from sovit.approximants import approximate_sqrt
from sovit.moments import covariance
from sovit.newton_schulz import covariance_sqrt, newton_schulz_sqrt
from sovit.powers import covariance_power, matrix_log, matrix_power, sv_power
from sovit.svpn import svpn
from tests.matrices import normal

BAD = (math.nan, math.inf, -math.inf)
DIMS = (3, 16, 32, 64, 256)


def svpn_from_ones(x: Tensor, **settings: int) -> Tensor:
    return svpn(x, torch.ones_like(x[0, 0]), **settings)


OF_MATRICES: dict[str, Callable[[Tensor], Tensor]] = {
    "eigen": matrix_power,
    "log": matrix_log,
    "svd": sv_power,
    "Newton-Schulz": newton_schulz_sqrt,
    "Newton-Schulz, N=1": partial(newton_schulz_sqrt, num_iterations=1),
    "Newton-Schulz, frobenius": partial(newton_schulz_sqrt, pre_norm="frobenius"),
    "MPA": approximate_sqrt,
    "MTP": partial(approximate_sqrt, approximant="mtp"),
    "minimax, s4": partial(
        newton_schulz_sqrt, num_iterations=3, coefficients="minimax", pre_norm="s4"
    ),
    "svPN": svpn_from_ones,
    "svPN, iterations": partial(svpn_from_ones, num_iterations=2),
    "svPN, values": partial(svpn_from_ones, num_iterations=2, num_singular_values=2),
}
OF_TOKENS: dict[str, Callable[[Tensor], Tensor]] = {
    "eigen": covariance_power,
    "log": lambda x: matrix_log(covariance(x)),
    "Newton-Schulz": covariance_sqrt,
}


def check(function: Callable[[Tensor], Tensor], x: Tensor, *, bad: Tensor) -> Tensor:
    """Hold the gradient of the first of three to be no number; return its value.

    The other two must be what they are without it.
    """
    results = []
    for tensor in (x, bad):
        leaf = tensor.clone().requires_grad_()
        result = function(leaf)
        result.backward(torch.ones_like(result))
        assert leaf.grad is not None
        results.append((result.detach(), leaf.grad))
    for alone, together in zip(*results, strict=True):
        torch.testing.assert_close(together[1:], alone[1:])
    value, grad = results[1]
    assert grad[0].isnan().all()
    return value[0]


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("name", OF_MATRICES)
def test_a_matrix_gives_none(name: str, dim: int, value: float) -> None:
    x = covariance(normal(3, dim + 1, dim, dtype=torch.float32))
    for column in (0, dim - 1):
        bad = x.clone()
        bad[0, 0, column] = value
        found = check(OF_MATRICES[name], x, bad=bad)
        # One iteration takes it no further than its row and column.
        found = found[0] if name.endswith("N=1") else found
        assert not found.isfinite().any()


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("num_tokens", [4, 49])
@pytest.mark.parametrize("name", OF_TOKENS)
def test_a_token_gives_none(name: str, num_tokens: int, value: float) -> None:
    x = normal(3, num_tokens, 32, dtype=torch.float32)
    bad = x.clone()
    bad[0, 1, 2] = value
    assert check(OF_TOKENS[name], x, bad=bad).isnan().all()
