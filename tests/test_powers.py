"""Exact powers and the logarithm: values, stable gradients, hazards."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sovit.moments import covariance
from sovit.powers import covariance_power, matrix_log, matrix_power, sv_power
from tests.matrices import check_autocast, normal, semidefinite, spectral

POWERS = pytest.mark.parametrize("power", [-1.0, -0.5, 0.3, 0.5, 1.0, 2.0])


@POWERS
@pytest.mark.parametrize("rank", [3, 9])
def test_power_is_that_of_the_eigenvalues(power: float, rank: int) -> None:
    x = semidefinite(3, dim=6, rank=rank)
    torch.testing.assert_close(matrix_power(x, power=power), spectral(x, power=power))


@POWERS
def test_gradients_are_right(power: float) -> None:
    def powered(x: Tensor) -> Tensor:
        return matrix_power(x, power=power)

    x = semidefinite(2, dim=4, rank=6) + 0.05 * normal(2, 4, 4, seed=1)
    x = x + torch.eye(4, dtype=x.dtype)
    assert torch.autograd.gradcheck(powered, (x.requires_grad_(),))
    assert torch.autograd.gradcheck(lambda x: matrix_log(x, eps=0.1), (x,))


@pytest.mark.parametrize("power", [0.3, 0.5, 2.0])
def test_repeated_eigenvalues_have_the_right_gradient(power: float) -> None:
    """Autograd through eigh gives NaN here."""
    turn, _ = torch.linalg.qr(normal(5, 5))
    values = torch.tensor([2.0, 2.0, 2.0, 0.5, 0.5]).double()
    x = ((turn * values) @ turn.T).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: matrix_power(x, power=power), (x,))
    assert torch.autograd.gradcheck(lambda x: matrix_log(x), (x,))
    eye = torch.eye(4).double().requires_grad_()
    (grad,) = torch.autograd.grad(matrix_power(eye, power=power).sum(), eye)
    torch.testing.assert_close(grad, power * torch.ones(4, 4).double())


@given(gap=st.floats(1e-9, 0.9), power=st.floats(0.05, 3.0))
def test_float32_quotients_are_exact_at_any_gap(gap: float, power: float) -> None:
    """Against the quotient in float64, worked out at the float32 eigenvalues."""
    x = torch.diag(torch.tensor([1.0, 1.0 - gap])).requires_grad_()
    (grad,) = torch.autograd.grad(matrix_power(x, power=power)[0, 1], x)
    a, b = x.detach().diagonal().double().tolist()
    wanted = (
        (a**power - b**power) / (a - b) if a - b > 1e-6 else power * a ** (power - 1)
    )
    assert grad[0, 1].item() == pytest.approx(wanted / 2, rel=1e-4)


@given(power=st.floats(0.1, 2.0), seed=st.integers(0, 50))
def test_powers_multiply_and_undo_each_other(power: float, seed: int) -> None:
    x = semidefinite(dim=4, rank=6, seed=seed)
    there = matrix_power(x, power=power)
    torch.testing.assert_close(matrix_power(there, power=1 / power), x)
    torch.testing.assert_close(there @ matrix_power(x, power=1 - power), x)


def test_the_scaled_power_tends_to_the_logarithm() -> None:
    x = semidefinite(dim=4, rank=9) + 0.1 * torch.eye(4).double()
    power = 1e-5
    near = (matrix_power(x, power=power) - torch.eye(4).double()) / power
    torch.testing.assert_close(near, matrix_log(x, eps=1e-12), rtol=0, atol=1e-3)


@pytest.mark.parametrize("num_tokens", [4, 49])
def test_the_float32_logarithm_of_few_tokens_is_that_of_float64(
    num_tokens: int,
) -> None:
    """What `eps` lifts above zero may be less than what rounds to zero elsewhere."""
    x = normal(2, num_tokens, 256) / torch.arange(1, 257) ** 0.5
    wanted = matrix_log(covariance(x))
    got = matrix_log(covariance(x.float())).double()
    error = torch.linalg.vector_norm(got - wanted)
    assert error < 0.05 * torch.linalg.vector_norm(wanted)


def test_logarithm_undoes_the_exponential() -> None:
    x = normal(4, 4)
    x = (x + x.T) / 2
    torch.testing.assert_close(
        matrix_log(torch.linalg.matrix_exp(x), eps=1e-14), x, rtol=0, atol=1e-8
    )
    with pytest.raises(ValueError, match="eps: expected over 0, got 0"):
        matrix_log(x, eps=0)


@POWERS
@pytest.mark.parametrize("num_tokens", [4, 9])
def test_power_of_tokens_is_that_of_their_covariance(
    num_tokens: int, power: float
) -> None:
    x = normal(2, num_tokens, 6).requires_grad_()
    got = covariance_power(x, power=power)
    torch.testing.assert_close(got, spectral(covariance(x), power=power))
    weight = normal(2, 6, 6, seed=1)
    (got_grad,) = torch.autograd.grad((got * weight).sum(), x)
    whole = matrix_power(covariance(x), power=power)
    (wanted_grad,) = torch.autograd.grad((whole * weight).sum(), x)
    torch.testing.assert_close(got_grad, wanted_grad)
    order = torch.arange(num_tokens).flip(0)
    torch.testing.assert_close(covariance_power(x[:, order], power=power), got)


@POWERS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("num_tokens", [4, 9])
def test_zero_map_and_low_rank_give_finite_gradients(
    num_tokens: int, dtype: torch.dtype, power: float
) -> None:
    x = torch.zeros(3, num_tokens, 6, dtype=dtype)
    x[1] = normal(num_tokens, 1, dtype=dtype) * normal(6, seed=1, dtype=dtype)
    x[2] = 5
    x.requires_grad_()
    got = covariance_power(x, power=power)
    logs = matrix_log(covariance(x))
    for result in (got, logs):
        assert torch.equal(result[0], torch.zeros_like(result[0]))
        assert result[1].abs().sum() > 0
        (grad,) = torch.autograd.grad(result.sum(), x, retain_graph=True)
        assert grad.isfinite().all()
        assert grad[1].abs().max() < 1e5


@pytest.mark.parametrize("backward_inside", [False, True])
def test_autocast_lowers_neither_direction(backward_inside: bool) -> None:
    check_autocast(covariance_power, normal(4, 5, 12), backward_inside=backward_inside)


def test_vmap_maps_values_and_gradients() -> None:
    x = semidefinite(3, dim=4, rank=6)
    mapped = torch.vmap(matrix_power)(x)
    torch.testing.assert_close(mapped, matrix_power(x))

    def loss(x: Tensor) -> Tensor:
        return matrix_power(x).square().sum()

    torch.testing.assert_close(
        torch.vmap(torch.func.grad(loss))(x), torch.func.grad(loss)(x)
    )


@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (4, 4)])
@pytest.mark.parametrize("power", [0.3, 0.5, 1.0, 2.0])
def test_powers_of_singular_values_have_the_right_gradient(
    power: float, shape: tuple[int, int]
) -> None:
    """Where they differ, where they are equal, and with a dead row and column."""

    def powered(x: Tensor) -> Tensor:
        return sv_power(x, power=power)

    alive = torch.ones(shape).double()
    alive[1], alive[:, 2] = 0, 0
    differing = normal(2, *shape).requires_grad_()
    equal = torch.linalg.svd(normal(*shape), full_matrices=False)
    equal = (equal.U @ equal.Vh).requires_grad_()
    assert torch.autograd.gradcheck(powered, (differing,))
    assert torch.autograd.gradcheck(powered, (equal,))
    assert torch.autograd.gradcheck(lambda x: powered(x * alive), (differing,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_singular_values_of_zero_give_finite_gradients(dtype: torch.dtype) -> None:
    x = torch.zeros(4, 48, 24, dtype=dtype)
    x[1] = normal(48, 1, dtype=dtype) * normal(24, seed=1, dtype=dtype)
    x[2] = covariance(normal(4, 48, dtype=dtype))[:, :24]
    x[3, :40, :20] = normal(40, 20, dtype=dtype)
    x.requires_grad_()
    sv_power(x).sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert x.grad[1:].abs().sum(dim=(1, 2)).min() > 0


def test_exact_power_of_singular_values() -> None:
    x = normal(3, 5, 8)
    gram = x @ x.mT
    root = sv_power(gram)
    torch.testing.assert_close(root @ root, gram)
    torch.testing.assert_close(root, matrix_power(gram))
    with pytest.raises(ValueError, match="power: expected over 0"):
        sv_power(x, power=0.0)
