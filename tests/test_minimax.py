"""The best coefficients for a number of steps: formulas, the root, its traps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import sovit
from sovit.minimax import (
    SAFETY,
    find_coefficients,
    gain,
    minimax_coefficients,
)
from sovit.moments import covariance
from sovit.newton_schulz import (
    covariance_sqrt,
    newton_schulz_inverse_sqrt,
    newton_schulz_sqrt,
)
from tests.matrices import coupled, normal, semidefinite, spectral

Steps = Sequence[tuple[float, float]]
NORMS = pytest.mark.parametrize("pre_norm", ["trace", "frobenius", "s4"])
COUNTS = pytest.mark.parametrize("num_iterations", [1, 2, 3, 4, 5, 6])
ROOTS: dict[float, Steps] = {
    0.02: (
        (4.892385853003077, -4.794576492554956),
        (2.355023717037876, -0.6174766273302701),
        (2.092044174296774, -0.5822132437468476),
        (1.757512223028431, -0.5363045959373067),
        (1.544615629437415, -0.5063583676910165),
        (1.501288249509795, -0.5001840227461807),
    ),
    0.08: (
        (4.16049393906412, -3.829615186914691),
        (1.932262086110454, -0.5604458215406137),
        (1.631031694575985, -0.5185898110460054),
        (1.511272194095118, -0.5016093285590619),
        (1.50008181786072, -0.5000116882137745),
        (1.500000004303441, -0.5000000006147772),
    ),
}
"""The pairs (a, b) of six steps before the first is made safe, by `lower`."""


def relative(steps: Steps, s: Tensor) -> Tensor:
    """Take relative roots s through steps."""
    for a, b in steps:
        s = s * (a + b * s**2)
    return s


def unsafe(steps: Steps) -> Steps:
    """Undo what makes the first step safe."""
    (a, b), *rest = steps
    return [(a * SAFETY, b * SAFETY**3), *rest]


@pytest.mark.parametrize("lower", ROOTS)
def test_coefficients_are_those_of_the_formulas(lower: float) -> None:
    found = unsafe(minimax_coefficients(6, lower=lower))
    for got, wanted in zip(found, ROOTS[lower], strict=True):
        assert got == pytest.approx(wanted, rel=1e-13)
    # Fewer steps are the first of more.
    assert (
        minimax_coefficients(3, lower=lower) == minimax_coefficients(6, lower=lower)[:3]
    )


@given(num_iterations=st.integers(1, 7), lower=st.floats(0.01, 0.9))
def test_the_error_oscillates_evenly_and_no_other_step_has_a_smaller_one(
    num_iterations: int, lower: float
) -> None:
    steps = unsafe(minimax_coefficients(num_iterations, lower=lower))
    grid = torch.linspace(lower, 1, 20_001, dtype=torch.float64)
    *before, (a, b) = steps
    reached = relative(before, grid)

    def worst(a: float, b: float) -> float:
        return float((relative([(a, b)], reached) - 1).abs().max())

    error = worst(a, b)
    ends = relative([(a, b)], torch.stack([reached.min(), reached.max()]))
    assert (1 - ends).tolist() == pytest.approx([error] * 2, abs=1e-6 + 1e-4 * error)
    if error > 1e-6:
        for change in (1e-4, -1e-4):
            assert worst(a * (1 + change), b) > error
            assert worst(a, b * (1 + change)) > error


@pytest.mark.parametrize(
    ("num_iterations", "largest", "error"),
    [(3, 9.78, 0.0424), (4, 18.87, 9.67e-3), (5, 41.97, 3.66e-3), (6, 93.56, 1.104e-3)],
)
def test_gain_and_error_of_the_defaults(
    num_iterations: int, largest: float, error: float
) -> None:
    steps = minimax_coefficients(num_iterations)
    assert gain(steps) == pytest.approx(largest, rel=1e-3)
    lower = {3: 0.125, 4: 0.08, 5: 0.04, 6: 0.02}[num_iterations]
    grid = torch.linspace(lower * SAFETY, SAFETY, 20_001, dtype=torch.float64)
    worst = float((relative(steps, grid) - 1).abs().max())
    assert worst == pytest.approx(error, rel=3e-3)


@pytest.mark.parametrize("num_iterations", range(1, 10))
def test_by_default_a_larger_eigenvalue_has_a_larger_root(num_iterations: int) -> None:
    values = torch.linspace(0, 1, 100_001, dtype=torch.float64)
    steps = minimax_coefficients(num_iterations)
    roots = values.sqrt() * relative(steps, values.sqrt())
    assert (roots.diff() > 0).all()
    # What rounding leaves above 1 is no trap, as it would be without the factor.
    above = relative(steps, torch.tensor([1.05]).double())
    assert abs(float(above) - 1) < 0.08
    assert relative(unsafe(steps), torch.tensor([1.1]).double()) < 0.8


@given(num_iterations=st.integers(1, 7), max_gain=st.floats(18, 900))
def test_the_gain_can_be_bounded(num_iterations: int, max_gain: float) -> None:
    steps = minimax_coefficients(num_iterations, max_gain=max_gain)
    assert gain(steps) <= max_gain
    largest = gain(minimax_coefficients(num_iterations, lower=1e-9))
    assert gain(steps) == pytest.approx(min(max_gain, largest), rel=1e-6)


@NORMS
@COUNTS
def test_values_and_gradients_are_those_of_the_coupled_iteration(
    num_iterations: int, pre_norm: str
) -> None:
    steps = minimax_coefficients(num_iterations)
    settings = {"num_iterations": num_iterations, "coefficients": "minimax"}
    weight = normal(6, 6, seed=1)
    for which, root in enumerate((newton_schulz_sqrt, newton_schulz_inverse_sqrt)):
        x = semidefinite(dim=6, rank=9).requires_grad_()
        got = root(x, pre_norm=pre_norm, **settings)
        wanted = coupled(x, steps=steps, pre_norm=pre_norm)[which]
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
        (got_grad,) = torch.autograd.grad((got * weight).sum(), x)
        (wanted_grad,) = torch.autograd.grad((wanted * weight).sum(), x)
        wanted_grad = (wanted_grad + wanted_grad.mT) / 2
        torch.testing.assert_close(got_grad, wanted_grad, rtol=1e-12, atol=1e-12)


@NORMS
def test_gradients_of_gradients_are_right(pre_norm: str) -> None:
    root = partial(
        newton_schulz_sqrt,
        num_iterations=3,
        coefficients="minimax",
        pre_norm=pre_norm,
    )
    x = semidefinite(2, dim=3, rank=5).requires_grad_()
    assert torch.autograd.gradcheck(root, (x,))
    assert torch.autograd.gradgradcheck(root, (x,))


@NORMS
@pytest.mark.parametrize("num_tokens", [4, 9])
def test_root_of_tokens_is_that_of_their_covariance(
    num_tokens: int, pre_norm: str
) -> None:
    x = normal(2, num_tokens, 6)
    settings = {"coefficients": "minimax", "num_iterations": 4, "pre_norm": pre_norm}
    got = covariance_sqrt(x, **settings)  # pyright: ignore[reportArgumentType]
    wanted = newton_schulz_sqrt(covariance(x), **settings)  # pyright: ignore
    torch.testing.assert_close(got, wanted)


@NORMS
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_zero_rank_one_and_equal_eigenvalues_in_float32(
    scale: float, pre_norm: str
) -> None:
    one = normal(1, 6, dtype=torch.float32)
    x = torch.stack([torch.zeros(6, 6), one.mT @ one, torch.eye(6)]) * scale
    x.requires_grad_()
    got = newton_schulz_sqrt(x, coefficients="minimax", pre_norm=pre_norm)
    (grad,) = torch.autograd.grad(got.sum(), x)
    assert not got[0].any()
    assert not grad[0].any()
    wanted = spectral(x[1:].double().detach() / scale, power=0.5)
    error = (got[1:].double() / scale**0.5 - wanted).abs().max()
    assert error < 0.01
    assert grad.isfinite().all()
    # One dominant direction: its gradient has the root's sign, if not its size.
    turned = one @ grad[1] @ one.mT
    assert turned > 0


def features(kind: str, *, num_tokens: int, seed: int) -> Tensor:
    """Draw the covariance of 256 channels whose spectrum is flat, falling or steep."""
    power = {"flat": 0.0, "falling": 0.5, "steep": 1.0}[kind]
    scales = torch.arange(1, 257, dtype=torch.float64) ** -power
    mixing, tokens = normal(256, 256, seed=seed), normal(256, num_tokens, seed=seed + 1)
    return covariance((mixing @ (scales[:, None] * tokens)).relu().mT[None])


@pytest.mark.parametrize(
    ("kind", "num_tokens", "papers", "ours"),
    [
        ("flat", 196, 0.400, {3: 0.289, 4: 0.128, 5: 0.038}),
        ("falling", 196, 0.375, {3: 0.289, 4: 0.138, 5: 0.044}),
        ("steep", 196, 0.250, {3: 0.212, 4: 0.134, 5: 0.063}),
        ("falling", 49, 0.202, {3: 0.113, 4: 0.016}),
    ],
)
def test_half_the_products_come_nearer_to_the_root(
    kind: str, num_tokens: int, papers: float, ours: dict[int, float]
) -> None:
    matrices = torch.cat(
        [features(kind, num_tokens=num_tokens, seed=2 * seed) for seed in range(6)]
    )
    exact = spectral(matrices, power=0.5)

    def error(root: Callable[[Tensor], Tensor]) -> float:
        difference = torch.linalg.matrix_norm(root(matrices) - exact)
        return float((difference / torch.linalg.matrix_norm(exact)).mean())

    assert error(newton_schulz_sqrt) == pytest.approx(papers, rel=0.05)
    for num_iterations, wanted in ours.items():
        found = error(
            partial(
                newton_schulz_sqrt,
                num_iterations=num_iterations,
                coefficients="minimax",
            )
        )
        assert found == pytest.approx(wanted, rel=0.05), num_iterations
        assert found < papers


def rounded_root(x: Tensor, steps: Steps, *, short: bool, by_w: bool) -> Tensor:
    """Take a root by the W form or the Z Y form, operands of products in bfloat16."""

    def product(left: Tensor, right: Tensor) -> Tensor:
        if not short:
            return left @ right
        return left.bfloat16().double() @ right.bfloat16().double()

    def step(y: Tensor, w: Tensor, pair: tuple[float, float]) -> Tensor:
        return pair[0] * y + pair[1] * product(y, w)

    y, w, z = x, x, torch.eye(x.shape[-1], dtype=x.dtype)
    for pair in steps:
        y = step(y, w, pair)
        if by_w:
            w = step(step(w, w, pair), w, pair)
        else:
            z = pair[0] * z + pair[1] * product(w, z)
            w = product(z, y)
    return y


def test_in_bfloat16_the_form_without_z_drifts_where_the_gain_is_large() -> None:
    """So the library keeps its products in float32, or TF32 where a run asks for it."""
    x = features("steep", num_tokens=196, seed=0)
    x = x / torch.linalg.matrix_norm(x @ x).sqrt()

    def drift(steps: Steps, *, by_w: bool) -> float:
        exact, short = (
            rounded_root(x, steps, short=short, by_w=by_w) for short in (False, True)
        )
        difference = torch.linalg.matrix_norm(short - exact)
        return float(difference / torch.linalg.matrix_norm(exact))

    papers = find_coefficients(5)
    assert drift(papers, by_w=True) < 0.02
    assert drift(minimax_coefficients(3), by_w=True) < 0.02
    steps = minimax_coefficients(5)
    assert drift(steps, by_w=True) > 3 * drift(steps, by_w=False)
    assert drift(steps, by_w=False) < 0.02


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"coefficients": "best"}, "expected one of"),
        ({"coefficients": ((1.5, -0.5),)}, "5 pairs"),
        ({"max_gain": 10.0}, "coefficients='minimax'"),
        ({"coefficients": "minimax", "max_gain": 3.0}, "at least"),
        ({"num_iterations": 0, "coefficients": "minimax"}, "at least 1"),
    ],
)
def test_what_does_not_fit_is_refused(settings: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        newton_schulz_sqrt(torch.eye(3), **settings)


def test_an_interval_is_chosen_once() -> None:
    with pytest.raises(ValueError, match="give one of them"):
        minimax_coefficients(3, lower=0.1, max_gain=9)
    with pytest.raises(ValueError, match="between 0 and 1"):
        minimax_coefficients(3, lower=1.0)


def test_poolings_have_them() -> None:
    settings = {"coefficients": "minimax", "num_iterations": 3, "reduced_dim": None}
    pooling = sovit.Pooling.named("isqrt_cov", **settings)
    pool = sovit.build_pooling(pooling, embed_dim=5).double()
    x = normal(2, 9, 5)
    root = covariance_sqrt(x, num_iterations=3, coefficients="minimax")
    torch.testing.assert_close(pool(x), sovit.upper_triangle(root).flatten(1))
    assert not torch.allclose(pool(x), sovit.upper_triangle(covariance_sqrt(x)))
    bounded = pooling.changed({"max_gain": 6})
    assert gain(find_coefficients(3, coefficients="minimax", max_gain=6)) == (
        pytest.approx(6)
    )
    other = sovit.build_pooling(bounded, embed_dim=5).double()
    assert not torch.allclose(other(x), pool(x))
    for wrong in ({"normalizer": "eigen"}, {"max_gain": 2}, {"coefficients": "best"}):
        with pytest.raises(ValueError, match=r"coefficients|max_gain"):
            pooling.changed(wrong)
