"""The Newton-Schulz root against its polynomial, its gradient, and its hazards."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sovit import newton_schulz
from sovit.moments import covariance
from sovit.newton_schulz import (
    covariance_sqrt,
    newton_schulz_inverse_sqrt,
    newton_schulz_sqrt,
)
from tests.matrices import check_autocast, normal, polynomial, semidefinite, spectral

BOTH = pytest.mark.parametrize("pre_norm", ["trace", "frobenius", "s4"])
COUNTS = pytest.mark.parametrize("num_iterations", [1, 2, 3, 5])


@BOTH
@pytest.mark.parametrize("num_iterations", [1, 2, 3, 5, 7])
def test_values_and_gradients_are_those_of_the_polynomial(
    num_iterations: int, pre_norm: str
) -> None:
    x = semidefinite(3, dim=6, rank=9).requires_grad_()
    got = newton_schulz_sqrt(x, num_iterations=num_iterations, pre_norm=pre_norm)
    wanted = torch.stack(
        [polynomial(one, num_iterations=num_iterations, pre_norm=pre_norm) for one in x]
    )
    torch.testing.assert_close(got, wanted)
    weight = normal(3, 6, 6, seed=1)
    (got_grad,) = torch.autograd.grad((got * weight).sum(), x)
    (wanted_grad,) = torch.autograd.grad((wanted * weight).sum(), x)
    # Only the symmetric part of a gradient means anything here, and ours is that.
    torch.testing.assert_close(got_grad, (wanted_grad + wanted_grad.mT) / 2)


@BOTH
@COUNTS
@pytest.mark.parametrize("root", [newton_schulz_sqrt, newton_schulz_inverse_sqrt])
def test_gradients_are_right(
    root: Callable[..., Tensor], num_iterations: int, pre_norm: str
) -> None:
    def of_any_matrix(x: Tensor) -> Tensor:
        # Not symmetric: its symmetric part counts.
        return root(x, num_iterations=num_iterations, pre_norm=pre_norm)

    x = semidefinite(2, dim=4, rank=5) + 0.1 * normal(2, 4, 4, seed=2)
    assert torch.autograd.gradcheck(of_any_matrix, (x.requires_grad_(),))


def test_one_iteration_is_the_special_case() -> None:
    x = semidefinite(dim=5, rank=5)
    a = x / x.trace()
    wanted = x.trace().sqrt() * a @ (3 * torch.eye(5).double() - a) / 2
    torch.testing.assert_close(newton_schulz_sqrt(x, num_iterations=1), wanted)


@BOTH
def test_many_iterations_are_the_exact_root(pre_norm: str) -> None:
    x = semidefinite(2, dim=6, rank=20)
    got = newton_schulz_sqrt(x, num_iterations=25, pre_norm=pre_norm)
    torch.testing.assert_close(got, spectral(x, power=0.5))
    inverse = newton_schulz_inverse_sqrt(x, num_iterations=25, pre_norm=pre_norm)
    torch.testing.assert_close(inverse, spectral(x, power=-0.5))


@given(seed=st.integers(0, 99), rank=st.integers(1, 8), dim=st.integers(1, 8))
def test_the_error_falls_with_every_iteration(seed: int, rank: int, dim: int) -> None:
    x = semidefinite(dim=dim, rank=rank, seed=seed)
    exact = spectral(x, power=0.5)
    errors = [
        (newton_schulz_sqrt(x, num_iterations=count) - exact).norm().item()
        for count in range(1, 12)
    ]
    for more, fewer in itertools.pairwise(errors):
        assert fewer <= more + 1e-9


@given(seed=st.integers(0, 99), scale=st.sampled_from([1e-3, 1.0, 1e3]))
def test_the_root_scales_as_a_root_and_turns_with_its_matrix(
    seed: int, scale: float
) -> None:
    x, (turn, _) = semidefinite(dim=5, rank=5, seed=seed), torch.linalg.qr(normal(5, 5))
    root = newton_schulz_sqrt(x)
    torch.testing.assert_close(newton_schulz_sqrt(scale * x), scale**0.5 * root)
    torch.testing.assert_close(
        newton_schulz_sqrt(turn @ x @ turn.T), turn @ root @ turn.T
    )


@BOTH
@COUNTS
@pytest.mark.parametrize("num_tokens", [4, 9])
def test_root_of_tokens_is_that_of_their_covariance(
    num_tokens: int, num_iterations: int, pre_norm: str
) -> None:
    """Four tokens of six channels go through the Gram matrix, nine do not."""
    x = normal(2, num_tokens, 6).requires_grad_()
    got = covariance_sqrt(x, num_iterations=num_iterations, pre_norm=pre_norm)
    wanted = newton_schulz_sqrt(
        covariance(x), num_iterations=num_iterations, pre_norm=pre_norm
    )
    torch.testing.assert_close(got, wanted)
    weight = normal(2, 6, 6, seed=1)
    (got_grad,) = torch.autograd.grad((got * weight).sum(), x)
    (wanted_grad,) = torch.autograd.grad((wanted * weight).sum(), x)
    torch.testing.assert_close(got_grad, wanted_grad)


@pytest.mark.parametrize("num_tokens", [5, 30])
def test_the_order_of_tokens_does_not_matter(num_tokens: int) -> None:
    x = normal(2, num_tokens, 8)
    order = torch.randperm(num_tokens, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(covariance_sqrt(x[:, order]), covariance_sqrt(x))


@BOTH
@COUNTS
@pytest.mark.parametrize("num_tokens", [4, 30])
def test_zero_map_gives_zeros_and_finite_gradients(
    num_tokens: int, num_iterations: int, pre_norm: str
) -> None:
    x = torch.zeros(3, num_tokens, 6)
    x[1] = normal(num_tokens, 6, dtype=torch.float32)
    # Equal tokens have no covariance either.
    x[2] = 3
    x.requires_grad_()
    got = covariance_sqrt(x, num_iterations=num_iterations, pre_norm=pre_norm)
    assert torch.equal(got[0], torch.zeros(6, 6))
    assert torch.equal(got[2], torch.zeros(6, 6))
    assert got[1].abs().sum() > 0
    (grad,) = torch.autograd.grad(got.sum(), x)
    assert grad.isfinite().all()


def test_rank_deficient_float32_has_small_gradients() -> None:
    x = semidefinite(2, dim=64, rank=20, dtype=torch.float32).requires_grad_()
    got = newton_schulz_sqrt(x)
    wanted = torch.stack([polynomial(one.double(), num_iterations=5) for one in x])
    torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-5)
    (grad,) = torch.autograd.grad(got.sum(), x)
    assert grad.abs().max() < 100


@pytest.mark.parametrize("backward_inside", [False, True])
@pytest.mark.parametrize("num_tokens", [5, 30])
def test_autocast_lowers_neither_direction(
    num_tokens: int, backward_inside: bool
) -> None:
    x = normal(4, num_tokens, 12)
    check_autocast(covariance_sqrt, x, backward_inside=backward_inside)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_iterated_in_float32(dtype: torch.dtype) -> None:
    x = normal(2, 30, 8).to(dtype)
    got = covariance_sqrt(x, num_iterations=15)
    assert got.dtype == torch.float32
    wanted = covariance_sqrt(x.double(), num_iterations=15)
    torch.testing.assert_close(got.double(), wanted, rtol=1e-3, atol=1e-4)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x = semidefinite(7, dim=5, rank=8).requires_grad_()
    results = []
    for num_bytes in (1, 500, 2**30):
        monkeypatch.setattr(newton_schulz, "CHUNK_BYTES", num_bytes)
        got = newton_schulz_sqrt(x)
        results.append([got, *torch.autograd.grad(got.square().sum(), x)])
    for result in results[1:]:
        torch.testing.assert_close(result, results[0])


def test_batches_of_any_shape_and_vmap_are_the_same() -> None:
    x = normal(2, 3, 7, 4)
    matrix = x.mT @ x
    flat = newton_schulz_sqrt(matrix.flatten(0, 1))
    torch.testing.assert_close(newton_schulz_sqrt(matrix), flat.view_as(matrix))
    torch.testing.assert_close(newton_schulz_sqrt(matrix[:0]), matrix[:0])

    def loss(x: Tensor) -> Tensor:
        return newton_schulz_sqrt(x.mT @ x).square().sum()

    mapped = torch.vmap(newton_schulz_sqrt)(matrix)
    torch.testing.assert_close(mapped, newton_schulz_sqrt(matrix))
    torch.testing.assert_close(
        torch.vmap(torch.func.grad(loss))(x), torch.func.grad(loss)(x)
    )


def test_it_keeps_half_of_what_autograd_keeps() -> None:
    x = semidefinite(2, dim=8, rank=9).requires_grad_()

    def kept(function: Callable[[Tensor], object]) -> int:
        sizes: dict[int, int] = {}
        alive = []

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            alive.append(tensor)
            if tensor.numel() == x.numel():
                sizes[storage.data_ptr()] = tensor.numel() // 64
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            function(x)
        return sum(sizes.values())

    assert kept(newton_schulz_sqrt) == 2 * 8
    eye = torch.eye(8, dtype=x.dtype)

    def straightforward(x: Tensor) -> Tensor:
        size = x.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]
        y = x / size
        z = eye.expand_as(y)
        for _ in range(5):
            t = (3 * eye - z @ y) / 2
            y, z = y @ t, t @ z
        return y * size.sqrt()

    assert kept(straightforward) >= 2 * kept(newton_schulz_sqrt)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_iterations": 0}, "num_iterations: expected at least 1, got 0"),
        ({"pre_norm": "max"}, "pre_norm: expected one of"),
    ],
)
def test_settings_out_of_range_are_refused(
    settings: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        newton_schulz_sqrt(normal(3, 3), **settings)  # pyright: ignore[reportArgumentType]
