"""MPA and MTP roots: their closed forms, gradients, few tokens, and hazards."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import Tensor

import sovit
from sovit.approximants import (
    APPROXIMANTS,
    approximate_covariance_sqrt,
    approximate_sqrt,
)
from sovit.moments import covariance
from tests.matrices import check_autocast, normal, semidefinite, spectral

BOTH = pytest.mark.parametrize("approximant", APPROXIMANTS)


def diagonal(*values: float) -> Tensor:
    return torch.diag(torch.tensor(values, dtype=torch.float64))


def root_of_one(value: float, *, approximant: str) -> float:
    """Take the root of an eigenvalue of A whose Frobenius norm is 1."""
    other = math.sqrt(1 - value**2)
    root = approximate_sqrt(diagonal(value, other), approximant=approximant)
    return float(root[0, 0])


@pytest.mark.parametrize("value", [0.0, 1e-3, 0.01, 0.056, 0.2, 0.5, 1.0])
def test_mpa_is_its_closed_form_which_never_is_below_the_root(value: float) -> None:
    w = math.sqrt(value)
    q = ((1 - w) / (1 + w)) ** 11
    # At 0 its limit.
    wanted = w * (1 + q) / (1 - q) if w else 1 / 11
    found = root_of_one(value, approximant="mpa")
    assert found == pytest.approx(wanted, rel=1e-12)
    assert found >= w - 1e-15
    if value >= 0.056:
        assert found == pytest.approx(w, rel=0.01)


@pytest.mark.parametrize("value", [0.0, 0.01, 0.17, 0.5, 1.0])
def test_mtp_is_the_taylor_polynomial_of_degree_ten(value: float) -> None:
    terms = [math.comb(2 * k, k) / 4**k / (1 - 2 * k) for k in range(11)]
    wanted = sum(term * (1 - value) ** k for k, term in enumerate(terms))
    found = root_of_one(value, approximant="mtp")
    assert found == pytest.approx(wanted, rel=1e-12)
    if value == 0:
        assert found == pytest.approx(math.comb(20, 10) / 4**10, rel=1e-12)
    if value >= 0.17:
        assert found == pytest.approx(math.sqrt(value), rel=0.01)


@BOTH
def test_it_turns_and_scales_with_its_matrix(approximant: str) -> None:
    root = partial(approximate_sqrt, approximant=approximant)
    x, (turn, _) = semidefinite(dim=5, rank=7), torch.linalg.qr(normal(5, 5))
    torch.testing.assert_close(root(turn @ x @ turn.T), turn @ root(x) @ turn.T)
    torch.testing.assert_close(root(9 * x), 3 * root(x))
    small = root((x * 1e-9).float()) / 1e-9**0.5
    torch.testing.assert_close(small.double(), root(x), rtol=1e-4, atol=1e-5)


@BOTH
def test_gradients_are_those_of_the_function_once_and_twice(approximant: str) -> None:
    root = partial(approximate_sqrt, approximant=approximant)
    x = (semidefinite(2, dim=3, rank=5) + 0.1 * normal(2, 3, 3)).requires_grad_()
    assert torch.autograd.gradcheck(root, (x,))
    # Twice, with tokens too, in test_derivatives.
    assert torch.autograd.gradgradcheck(root, (x[:1],))


def test_the_gradient_has_the_direction_of_the_papers() -> None:
    """Theirs solves B X + X B = G with B the approximate root, without its factor."""
    x = semidefinite(dim=6, rank=9).requires_grad_()
    weight = normal(6, 6, seed=1)
    weight = weight + weight.T
    size = torch.linalg.matrix_norm(x.detach())
    root = approximate_sqrt(x / size)
    (ours,) = torch.autograd.grad((root * weight).sum(), x)
    values, vectors = torch.linalg.eigh(root.detach())
    turned = vectors.T @ weight @ vectors
    lyapunov = vectors @ (turned / (values[:, None] + values)) @ vectors.T / size
    cosine = torch.nn.functional.cosine_similarity(
        ours.flatten(), lyapunov.flatten(), dim=0
    )
    assert 0.98 < cosine < 1 - 1e-9


@BOTH
@pytest.mark.parametrize("num_tokens", [4, 9])
def test_root_of_tokens_is_that_of_their_covariance(
    num_tokens: int, approximant: str
) -> None:
    """Zero eigenvalues of four tokens are lifted as those of the covariance."""
    x = normal(2, num_tokens, 6).requires_grad_()
    weight = normal(2, 6, 6, seed=1)
    got = approximate_covariance_sqrt(x, approximant=approximant)
    wanted = approximate_sqrt(covariance(x), approximant=approximant)
    torch.testing.assert_close(got, wanted)
    (got_grad,) = torch.autograd.grad((got * weight).sum(), x)
    (wanted_grad,) = torch.autograd.grad((wanted * weight).sum(), x)
    torch.testing.assert_close(got_grad, wanted_grad)


@BOTH
@pytest.mark.parametrize("num_tokens", [3, 30])
def test_zero_and_equal_tokens_give_zero_and_no_number_gives_none(
    num_tokens: int, approximant: str
) -> None:
    x = torch.zeros(4, num_tokens, 6)
    x[1] = normal(num_tokens, 6, dtype=torch.float32)
    x[2] = 3
    x[3] = x[1]
    x[3, 0, 0] = torch.nan
    x.requires_grad_()
    got = approximate_covariance_sqrt(x, approximant=approximant)
    assert not got[0].any()
    assert not got[2].any()
    assert got[3].isnan().all()
    (grad,) = torch.autograd.grad(got.sum(), x)
    assert grad[:3].isfinite().all()
    assert not grad[0].any()
    assert grad[3].isnan().any()


@BOTH
def test_float32_is_near_and_autocast_changes_nothing(approximant: str) -> None:
    x = semidefinite(2, dim=64, rank=80)
    root = partial(approximate_sqrt, approximant=approximant)
    error = torch.linalg.matrix_norm(root(x.float()).double() - root(x))
    assert (error / torch.linalg.matrix_norm(root(x)) < 1e-5).all()
    for inside in (False, True):
        check_autocast(root, x, backward_inside=inside)


def test_mpa_is_nearer_than_mtp_and_both_lift_small_eigenvalues() -> None:
    x = semidefinite(dim=24, rank=24)
    exact = spectral(x, power=0.5)
    errors = [
        float(torch.dist(approximate_sqrt(x, approximant=name), exact))
        for name in APPROXIMANTS
    ]
    assert errors[0] < errors[1]
    for name in APPROXIMANTS:
        assert approximate_sqrt(x, approximant=name).trace() > exact.trace()


@BOTH
def test_poolings_have_them(approximant: str) -> None:
    pooling = sovit.Pooling.named("mpn_cov", normalizer=approximant, reduced_dim=None)
    pool = sovit.build_pooling(pooling, embed_dim=5).double()
    for num_tokens in (3, 9):
        x = normal(2, num_tokens, 5)
        root = approximate_covariance_sqrt(x, approximant=approximant)
        torch.testing.assert_close(pool(x), sovit.upper_triangle(root).flatten(1))
    with pytest.raises(ValueError, match="normalizer"):
        sovit.Pooling(normalizer=approximant)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="'mpa'"):
        approximate_sqrt(torch.eye(3), approximant="pade")
