"""svPN against the formula it stands for, the exact power, and its hazards."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from sovit.powers import sv_power
from sovit.svpn import REMAINDER_EPS, svpn
from tests.matrices import check_autocast, normal


def by_definition(
    x: Tensor, start: Tensor, *, power: float, num_iterations: int, num_values: int
) -> Tensor:
    """Return svPN of one matrix, word by word as the paper's code defines it."""
    rest, total, s = x, torch.zeros_like(x), x.new_zeros(())
    for _ in range(num_values):
        u, v = start, start
        for _ in range(num_iterations):
            u = functional.normalize(rest @ v, dim=0)
            v = functional.normalize(rest.T @ u, dim=0)
        s = u @ rest @ v
        total = total + s**power * torch.outer(u, v)
        rest = rest - s * torch.outer(u, v)
    return total + rest / (s ** (1 - power) + REMAINDER_EPS)


@pytest.mark.parametrize(
    ("num_values", "num_iterations"), [(1, 1), (1, 3), (2, 2), (3, 4)]
)
@pytest.mark.parametrize("power", [0.3, 0.5, 1.0])
def test_values_and_gradients_are_those_of_the_definition(
    num_values: int, num_iterations: int, power: float
) -> None:
    x, start = normal(2, 5, 7).requires_grad_(), normal(7, seed=1).requires_grad_()
    got = svpn(
        x,
        start,
        power=power,
        num_iterations=num_iterations,
        num_singular_values=num_values,
    )
    wanted = torch.stack(
        [
            by_definition(
                one,
                start,
                power=power,
                num_iterations=num_iterations,
                num_values=num_values,
            )
            for one in x
        ]
    )
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-11)
    weight = normal(*got.shape, seed=2)
    got_grads = torch.autograd.grad((got * weight).sum(), (x, start))
    wanted_grads = torch.autograd.grad((wanted * weight).sum(), (x, start))
    for got_grad, wanted_grad in zip(got_grads, wanted_grads, strict=True):
        torch.testing.assert_close(got_grad, wanted_grad, rtol=1e-7, atol=1e-9)


@given(
    rows=st.integers(1, 6),
    columns=st.integers(1, 6),
    power=st.floats(0.1, 1.0),
    scale=st.sampled_from([1e-2, 1.0, 1e2]),
    seed=st.integers(0, 99),
)
def test_one_singular_value_divides_by_its_power(
    rows: int, columns: int, power: float, scale: float, seed: int
) -> None:
    x, start = scale * normal(rows, columns, seed=seed), normal(columns, seed=seed + 1)
    s = (x.T @ x @ start).norm() / (x @ start).norm()
    got = svpn(x, start, power=power, eps=0.0)
    torch.testing.assert_close(got, x / s ** (1 - power), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("num_values", [2, 4, None])
def test_one_iteration_finds_one_direction(num_values: int | None) -> None:
    x, start = normal(2, 4, 6).requires_grad_(), normal(6, seed=1)
    got = svpn(x, start, num_singular_values=num_values)
    wanted = svpn(x, start)
    torch.testing.assert_close(got, wanted)
    (got_grad,) = torch.autograd.grad(got.square().sum(), x)
    (wanted_grad,) = torch.autograd.grad(wanted.square().sum(), x)
    torch.testing.assert_close(got_grad, wanted_grad)


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5)])
@pytest.mark.parametrize("power", [0.5, 0.2])
def test_many_iterations_and_values_are_the_exact_power(
    shape: tuple[int, int], power: float
) -> None:
    x, start = normal(3, *shape), torch.ones(shape[1], dtype=torch.float64)
    got = svpn(x, start, power=power, num_iterations=500, num_singular_values=None)
    torch.testing.assert_close(got, sv_power(x, power=power), rtol=0, atol=1e-6)


def test_exact_power_of_a_symmetric_matrix_is_its_root() -> None:
    x = normal(3, 5, 8)
    gram = x @ x.mT
    root = sv_power(gram)
    torch.testing.assert_close(root @ root, gram)


@pytest.mark.parametrize("num_values", [1, 2, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_map_gives_zeros_and_finite_gradients(
    num_values: int | None, dtype: torch.dtype
) -> None:
    x = torch.zeros(2, 4, 6, dtype=dtype)
    x[1] = normal(4, 6, dtype=dtype)
    x.requires_grad_()
    start = normal(6, seed=1, dtype=dtype).requires_grad_()
    got = svpn(x, start, num_singular_values=num_values)
    assert torch.equal(got[0], torch.zeros_like(got[0]))
    assert got[1].abs().sum() > 0
    for grad in torch.autograd.grad(got.sum(), (x, start)):
        assert grad.isfinite().all()


@pytest.mark.parametrize("num_values", [2, 4, None])
def test_low_rank_has_finite_gradients_and_the_right_value(
    num_values: int | None,
) -> None:
    x = (normal(2, 4, 1) @ normal(2, 1, 6, seed=1)).float().requires_grad_()
    start = normal(6, seed=2).float().requires_grad_()
    got = svpn(x, start, num_iterations=2, num_singular_values=num_values)
    torch.testing.assert_close(got, sv_power(x), rtol=1e-3, atol=1e-3)
    for grad in torch.autograd.grad(got.square().sum(), (x, start)):
        assert grad.isfinite().all()
        assert grad.abs().max() < 1e3


@pytest.mark.parametrize("num_values", [1, 2, None])
@pytest.mark.parametrize("num_iterations", [1, 2])
def test_gradients_are_right(num_values: int | None, num_iterations: int) -> None:
    def powered(x: Tensor, start: Tensor) -> Tensor:
        return svpn(
            x, start, num_iterations=num_iterations, num_singular_values=num_values
        )

    x, start = normal(2, 3, 4).requires_grad_(), normal(4, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(powered, (x, start))


@pytest.mark.parametrize("num_values", [1, 3])
@pytest.mark.parametrize("backward_inside", [False, True])
def test_autocast_lowers_neither_direction(
    num_values: int, backward_inside: bool
) -> None:
    start = normal(12, seed=1, dtype=torch.float32)
    check_autocast(
        lambda x: svpn(x, start, num_singular_values=num_values),
        normal(4, 8, 12),
        backward_inside=backward_inside,
    )


def test_bfloat16_matrices_are_powered_in_float32() -> None:
    x, start = normal(2, 4, 6).bfloat16(), normal(6, seed=1).bfloat16()
    got = svpn(x, start)
    assert got.dtype == torch.float32
    wanted = svpn(x.double(), start.double()).float()
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


def test_vmap_maps_values_and_gradients_over_matrices() -> None:
    x, start = normal(5, 3, 4), normal(4, seed=1)

    def loss(x: Tensor) -> Tensor:
        return svpn(x, start, num_singular_values=2).square().sum()

    torch.testing.assert_close(
        torch.vmap(lambda one: svpn(one, start))(x), svpn(x, start)
    )
    torch.testing.assert_close(
        torch.vmap(torch.func.grad(loss))(x), torch.func.grad(loss)(x)
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"power": 0.0}, "power: expected"),
        ({"power": 1.5}, "power: expected"),
        ({"num_iterations": 0}, "num_iterations: expected"),
        ({"num_singular_values": 0}, "num_singular_values: expected"),
        ({"num_singular_values": 4}, "between 1 and 3"),
    ],
)
def test_settings_out_of_range_are_refused(
    settings: dict[str, float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        svpn(normal(3, 4), normal(4), **settings)  # pyright: ignore[reportArgumentType]
