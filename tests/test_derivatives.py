"""Second derivatives of everything that normalises, against finite differences."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

import sovit
from sovit.approximants import approximate_covariance_sqrt, approximate_sqrt
from sovit.moments import covariance
from sovit.newton_schulz import (
    covariance_sqrt,
    newton_schulz_inverse_sqrt,
    newton_schulz_sqrt,
)
from sovit.pooling_settings import Normalizer
from sovit.powers import covariance_power, matrix_log, matrix_power, sv_power
from sovit.svpn import svpn
from tests.matrices import normal

# Relative, against central differences of gradients.
TOLERANCE = 1e-6
STEP = 1e-5
START = normal(6, seed=9)
TURN = torch.linalg.qr(normal(5, 5)).Q


def turned(*values: float) -> Tensor:
    """Make a symmetric matrix of its eigenvalues."""
    return (TURN * torch.tensor(values).double()) @ TURN.T


def without(dim: int, *dead: int) -> Tensor:
    """Make a mask of channels."""
    mask = torch.ones(dim).double()
    mask[list(dead)] = 0
    return mask


def of_covariance(
    function: Callable[[Tensor], Tensor], *dead: int
) -> Callable[[Tensor], Tensor]:
    return lambda x: function(covariance(x * without(x.shape[-1], *dead)))


MANY, FEW = normal(2, 12, 5), normal(2, 4, 6)
CASES: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {
    "eigen": (of_covariance(matrix_power), MANY),
    "eigen, another power": (of_covariance(partial(matrix_power, power=0.3)), MANY),
    "eigen, power 2": (of_covariance(partial(matrix_power, power=2.0)), MANY),
    "eigen, inverse": (of_covariance(partial(matrix_power, power=-0.5)), MANY),
    "eigen, few tokens": (covariance_power, FEW),
    "eigen, few tokens, zeros": (of_covariance(matrix_power), FEW),
    "eigen, dead channels": (of_covariance(matrix_power, 0, 1), MANY),
    "eigen, all equal": (matrix_power, torch.eye(4).double()),
    "eigen, some equal": (matrix_power, turned(2, 2, 2, 0.5, 0.5)),
    "eigen, nearly equal": (matrix_power, turned(2, 2 + 3e-6, 2 - 1e-5, 0.5, 0.5)),
    "eigen, closer still": (matrix_power, turned(2, 2 + 1e-9, 2 - 1e-4, 0.5, 0.5)),
    "log": (of_covariance(matrix_log), MANY),
    "log, few tokens": (of_covariance(matrix_log), FEW),
    "log, all equal": (matrix_log, torch.eye(4).double()),
    "svd": (sv_power, normal(2, 5, 3)),
    "svd, wide": (partial(sv_power, power=0.3), normal(2, 3, 5)),
    "svd, square": (sv_power, normal(2, 4, 4)),
    "svd, equal": (sv_power, torch.linalg.qr(normal(5, 3)).Q),
    "svd, dead channel": (lambda x: sv_power(x * without(3, 1)), normal(2, 5, 3)),
    "Newton-Schulz": (newton_schulz_sqrt, turned(2, 1, 0.5, 0.1, 0)),
    "Newton-Schulz, N=1": (
        of_covariance(partial(newton_schulz_sqrt, num_iterations=1)),
        MANY,
    ),
    "Newton-Schulz, N=5, frobenius": (
        of_covariance(
            partial(newton_schulz_sqrt, num_iterations=5, pre_norm="frobenius")
        ),
        MANY,
    ),
    "minimax, N=4, s4": (
        of_covariance(
            partial(
                newton_schulz_sqrt,
                num_iterations=4,
                coefficients="minimax",
                pre_norm="s4",
            )
        ),
        MANY,
    ),
    "minimax, few tokens": (partial(covariance_sqrt, coefficients="minimax"), FEW),
    "MPA": (of_covariance(approximate_sqrt), MANY),
    "MPA, few tokens": (approximate_covariance_sqrt, FEW),
    "MTP, few tokens": (
        partial(approximate_covariance_sqrt, approximant="mtp"),
        FEW,
    ),
    "Newton-Schulz, inverse": (of_covariance(newton_schulz_inverse_sqrt), MANY),
    "Newton-Schulz, few tokens": (covariance_sqrt, FEW),
    "Newton-Schulz, not symmetric": (
        newton_schulz_sqrt,
        normal(4, 4) + 3 * torch.eye(4).double(),
    ),
    "svPN": (lambda x: svpn(x, START), FEW),
    "svPN, by the start": (lambda start: svpn(FEW, start), START),
    "svPN, another power": (lambda x: svpn(x, START, power=0.3, eps=0.0), FEW),
    "svPN, three iterations": (lambda x: svpn(x, START, num_iterations=3), FEW),
    "svPN, all values": (
        lambda x: svpn(x, START, num_iterations=2, num_singular_values=None),
        FEW,
    ),
}


def gradient(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(function(x), x)[0]


def hessian_product(
    function: Callable[[Tensor], Tensor], x: Tensor, direction: Tensor
) -> Tensor:
    product = torch.autograd.functional.hvp(function, x, direction)[1]
    assert isinstance(product, Tensor)
    return product


def close(got: Tensor, wanted: Tensor) -> None:
    error = torch.linalg.vector_norm(got - wanted)
    assert error <= TOLERANCE * torch.linalg.vector_norm(wanted)


@pytest.mark.parametrize(("function", "x"), CASES.values(), ids=CASES)
def test_second_derivatives_are_right(
    function: Callable[[Tensor], Tensor], x: Tensor
) -> None:
    """The gradient that comes in is constant: where the missing terms were silent."""
    weight = normal(*function(x).shape, seed=5)

    def loss(x: Tensor) -> Tensor:
        return (function(x) * weight).sum()

    direction = normal(*x.shape, seed=7)
    there, back = (gradient(loss, x + step * direction) for step in (STEP, -STEP))
    wanted = (there - back) / (2 * STEP)
    close(hessian_product(loss, x, direction), wanted)
    hessian = torch.func.jacrev(torch.func.jacrev(loss))(x)
    assert isinstance(hessian, Tensor)
    close((hessian.flatten(-x.ndim) @ direction.flatten()), wanted)


@pytest.mark.parametrize(
    "name", ["eigen", "eigen, few tokens", "log", "svd", "Newton-Schulz, few tokens"]
)
def test_they_hold_whatever_comes_in(name: str) -> None:
    function, x = CASES[name]
    x = x[:1, :5, :3].clone().requires_grad_()
    assert torch.autograd.gradgradcheck(function, (x,))


def test_svpn_holds_in_both_of_its_arguments() -> None:
    x, start = normal(2, 3, 4).requires_grad_(), normal(4, seed=1).requires_grad_()
    assert torch.autograd.gradgradcheck(svpn, (x, start))


def test_zero_maps_have_no_curvature_that_is_no_number() -> None:
    def loss(x: Tensor) -> Tensor:
        results = (
            covariance_power(x),
            matrix_log(covariance(x)),
            covariance_sqrt(x),
            sv_power(x),
            svpn(x, START),
        )
        return sum((result * normal(*result.shape)).sum() for result in results)  # pyright: ignore

    x = torch.zeros(2, 4, 6).double()
    x[1] = normal(4, 6)
    got = hessian_product(loss, x, torch.ones_like(x))
    assert got.isfinite().all()
    assert got[1].abs().sum() > 0


def curvature(x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    result = function(x)
    loss = (result * normal(*result.shape, seed=3)).sum()
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    (grad,) = torch.autograd.grad(grad.sum(), x, create_graph=True)
    return grad.sum()


@pytest.mark.parametrize("name", ["Newton-Schulz, few tokens", "svPN"])
def test_newton_schulz_and_svpn_have_a_third_derivative(name: str) -> None:
    function, x = CASES[name]
    point = x.clone().requires_grad_()
    got = torch.autograd.grad(curvature(point, function), point)[0].sum()
    around = [curvature((x + s).requires_grad_(), function) for s in (STEP, -STEP)]
    close(got, (around[0] - around[1]) / (2 * STEP))


@pytest.mark.parametrize("name", ["eigen", "log", "svd"])
def test_functions_of_eigenvalues_refuse_a_third(name: str) -> None:
    function, x = CASES[name]
    point = x.clone().requires_grad_()
    with pytest.raises(RuntimeError, match=r"at most two .* got a third"):
        torch.autograd.grad(curvature(point, function), point)


def smooth(model: nn.Module) -> nn.Module:
    """Replace ReLU and max-pooling: finite differences run over their kinks."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.ReLU):
                setattr(module, name, nn.SiLU())
            elif isinstance(child, nn.MaxPool2d):
                setattr(module, name, nn.AvgPool2d(2))
    return model


def network(normalizer: Normalizer) -> nn.Module:
    torch.manual_seed(0)
    if normalizer in ("svpn", "svd"):
        pooling = sovit.Pooling(reduced_dim=(6, 4), normalizer=normalizer)
        return timm.create_model(
            "so_vit_7",
            img_size=64,
            num_classes=3,
            depth=1,
            embed_dim=16,
            num_heads=2,
            token_embed="linear",
            pooling=pooling,
        )
    pooling = sovit.Pooling(
        type="cov", reduced_dim=6, normalizer=normalizer, num_iterations=5
    )
    return sovit.second_order("test_resnet", pooling=pooling, num_classes=3)


@pytest.mark.parametrize("is_frozen", [False, True])
@pytest.mark.parametrize("normalizer", ["svpn", "svd", "newton_schulz", "eigen", "log"])
def test_gradient_penalties_go_through_whole_networks(
    normalizer: Normalizer, is_frozen: bool
) -> None:
    """Of all weights, or of the head's and the images alone."""
    model = smooth(network(normalizer)).double().train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not is_frozen or "head" in name)
    weights = [p for p in model.parameters() if p.requires_grad]
    images, labels = normal(3, 3, 64, 64), torch.arange(3)

    def penalty(images: Tensor, *, create_graph: bool) -> tuple[Tensor, Tensor]:
        images = images.clone().requires_grad_()
        # The fused attention of a CPU has one derivative, and says so.
        with sdpa_kernel(SDPBackend.MATH):
            loss = functional.cross_entropy(model(images), labels)
            (grad,) = torch.autograd.grad(loss, images, create_graph=create_graph)
        return images, grad.square().sum()

    leaf, value = penalty(images, create_graph=True)
    grads = torch.autograd.grad(value, [leaf, *weights], allow_unused=True)
    directions = [normal(*x.shape, seed=i) for i, x in enumerate([images, *weights])]
    got = sum(
        (grad * direction).sum().item()
        for grad, direction in zip(grads, directions, strict=True)
        if grad is not None
    )
    around = []
    for step in (1e-6, -1e-6):
        for weight, direction in zip(weights, directions[1:], strict=True):
            weight.data += step * direction
        moved = images + step * directions[0]
        around.append(penalty(moved, create_graph=False)[1].item())
        for weight, direction in zip(weights, directions[1:], strict=True):
            weight.data -= step * direction
    assert got == pytest.approx((around[0] - around[1]) / 2e-6, rel=TOLERANCE)
