"""Functions of the eigenvalues of symmetric matrices, and where to decompose them.

With x = U diag(l) U^T such a function is f(x) = U diag(f(l)) U^T. Its derivatives are
Daletskii and Krein's: the first in a symmetric direction G is U (L o (U^T G U)) U^T
with Loewner's matrix L of the difference quotients f[l_i, l_j], the second has the
quotients of these, f[l_i, l_k, l_j]. Where eigenvalues are equal, or zero, quotients
have limits: autograd through `eigh` has NaN there.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from sovit.derivatives import is_recorded, refuse_derivative
from sovit.precision import at_least_float32, autocast_off
from sovit.shapes import Float, Tensor

PLACEMENTS = ("auto", "device", "host")
# Since this version PyTorch decomposes a batch on a GPU in one call, whatever its size.
# Before, matrices above the other size went one after the other (pytorch 175403).
BATCHED_SINCE = "2.12"
BATCHED_SIZE = 32


class Function(NamedTuple):
    """Function of eigenvalues; zero stays zero."""

    power: float | None
    """An exponent, or None for the logarithm."""
    is_odd: bool = False
    """Whether negative eigenvalues keep their sign. Elsewhere they are rounding, and
    zero."""
    lowest: float = 0.0
    """The least that eigenvalues can be, in parts of their mean; what rounding leaves
    below is raised to it. Where it is 0, rounding of zero becomes zero."""


def symmetric_eig(
    matrix: Float[Tensor, "*batch d d"], *, placement: str = "auto"
) -> tuple[Float[Tensor, "*batch d"], Float[Tensor, "*batch d d"]]:
    """Decompose symmetric matrices: eigenvalues, ascending, and eigenvectors.

    `placement` is where that happens for matrices on an accelerator: "device" is
    PyTorch's own solver there, "host" copies the matrices to LAPACK and the result
    back, and "auto" takes the device unless this PyTorch would decompose a batch there
    matrix by matrix. Both wait for the device once: the solver reads a flag back. On a
    CPU all three are the same, and for meta tensors, which have nothing to copy. Not
    differentiable: see `spectral`.

    Raises ValueError for another placement.
    """
    if placement not in PLACEMENTS:
        raise ValueError(
            f"placement: expected one of {PLACEMENTS}, got {placement!r}; 'auto' "
            "decides by the version of PyTorch"
        )
    if placement == "auto":
        placement = _find_placement(matrix)
    if placement == "device" or matrix.is_meta:
        values, vectors = torch.linalg.eigh(matrix)
        return values, vectors
    values, vectors = torch.linalg.eigh(matrix.cpu())
    to = {"device": matrix.device, "non_blocking": True}
    return values.to(**to), vectors.to(**to)


def _find_placement(matrix: Tensor) -> str:
    """Choose the host where the device's solver would go matrix by matrix."""
    looped = (
        matrix.device.type != "cpu"
        and torch.__version__ < BATCHED_SINCE
        and matrix.shape[-1] > BATCHED_SIZE
        and matrix.shape[:-2].numel() > 1
    )
    return "host" if looped else "device"


def spectral(
    x: Float[Tensor, "*batch d d"], function: Function, *, placement: str = "auto"
) -> Float[Tensor, "*batch d d"]:
    """Apply a function to the eigenvalues of the symmetric part of matrices.

    It can be differentiated twice; a third time is an error. A matrix with NaN or
    infinity in it gives NaN, and NaN for its gradient. Float32 inside, or float64 for
    float64 input.
    """
    with autocast_off(x.device.type):
        matrix = at_least_float32(x)
        result, *_ = _Spectral.apply(matrix, function, placement)  # pyright: ignore
        return result


def spectral_derivative(
    x: Float[Tensor, "*batch d d"],
    direction: Float[Tensor, "*batch d d"],
    function: Function,
) -> Float[Tensor, "*batch d d"]:
    """Return the derivative of `spectral` in a direction, a function of both."""
    _, values, vectors = _Spectral.apply(x, function, "auto")  # pyright: ignore
    result: Tensor = _Derivative.apply(x, direction, values, vectors, function)  # pyright: ignore
    return result


def only_finite(
    x: Float[Tensor, "*batch m n"],
) -> tuple[Float[Tensor, "*batch m n"], Tensor]:
    """Replace matrices with NaN or infinity by zeros; return which were finite.

    Solvers may raise for such a matrix, or return arbitrary numbers.
    """
    is_finite = x.abs().amax((-2, -1)).isfinite()
    return torch.where(is_finite[..., None, None], x, 0.0), is_finite[..., None]


class _Spectral(torch.autograd.Function):
    """Function of the eigenvalues, with eigenvalues and eigenvectors."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, function: Function, placement: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        matrix, is_finite = only_finite(_symmetric(x))
        values, vectors = symmetric_eig(matrix, placement=placement)
        values = torch.where(is_finite, _settle(values, function), torch.nan)
        applied = _apply(values, function).unsqueeze(-2)
        return (vectors * applied) @ vectors.mT, values, vectors

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, ctx.function, _ = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(x, *output[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor | None, *_: None
    ) -> tuple[Tensor | None, None, None]:
        if grad is None:
            return None, None, None
        x, values, vectors = ctx.saved_tensors
        with autocast_off(x.device.type):
            if is_recorded():
                of_x = _Derivative.apply(x, grad, values, vectors, ctx.function)
            else:
                of_x = _derivative(grad, values, vectors, ctx.function)
            return of_x, None, None  # pyright: ignore[reportReturnType]


class _Derivative(torch.autograd.Function):
    """First derivative in a direction, as a function of x and of the direction."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, first: Tensor, values: Tensor, vectors: Tensor, function: Function
    ) -> Tensor:
        return _derivative(first, values, vectors, function)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, ctx.function = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        x, first, values, vectors = ctx.saved_tensors
        (second,) = grad_outputs
        found = values, vectors, ctx.function
        with autocast_off(x.device.type):
            if is_recorded():
                last = refuse_derivative(x)
                of_x = _SecondDerivative.apply(last, first, second, *found)
                of_first = _Derivative.apply(x, second, *found)
            else:
                of_x = _second_derivative(first, second, *found)
                of_first = _derivative(second, *found)
            return of_x, of_first, None, None, None


class _SecondDerivative(torch.autograd.Function):
    """Second derivative in two directions, as a function of these.

    `x` only stands for what values and vectors belong to: its gradient is not here.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        first: Tensor,
        second: Tensor,
        values: Tensor,
        vectors: Tensor,
        function: Function,
    ) -> Tensor:
        return _second_derivative(first, second, values, vectors, function)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, ctx.function = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        x, first, second, values, vectors = ctx.saved_tensors
        (third,) = grad_outputs
        found = values, vectors, ctx.function
        with autocast_off(x.device.type):
            of_first, of_second = (
                _SecondDerivative.apply(x, direction, third, *found)
                for direction in (second, first)
            )
            return torch.zeros_like(x), of_first, of_second, None, None, None


def _settle(values: Tensor, function: Function) -> Tensor:
    """Replace eigenvalues that can only be rounding."""
    if function.lowest:
        return values.maximum(function.lowest * values.mean(-1, keepdim=True))
    size = values.abs() if function.is_odd else values
    floor = values.abs().amax(-1, keepdim=True)
    floor = floor * (values.shape[-1] * torch.finfo(values.dtype).eps)
    return torch.where(size > floor, values, 0.0)


def _apply(values: Tensor, function: Function) -> Tensor:
    is_zero = values == 0
    size = torch.where(is_zero, 1.0, values.abs())
    applied = size.log() if function.power is None else size**function.power
    applied = torch.where(is_zero, 0.0, applied)
    return applied * values.sign() if function.is_odd else applied


def _derivative(
    grad: Tensor, values: Tensor, vectors: Tensor, function: Function
) -> Tensor:
    inner = _symmetric(vectors.mT @ grad @ vectors) * loewner(values, function)
    return vectors @ inner @ vectors.mT


def _second_derivative(
    first: Tensor, second: Tensor, values: Tensor, vectors: Tensor, function: Function
) -> Tensor:
    """Return the second derivative in two directions.

    With both in the basis of eigenvectors, G and H, its elements are the sums over k of
    f[l_i, l_k, l_j] (G_ik H_kj + H_ik G_kj). Where l_i and l_j differ, that quotient is
    (f[l_i, l_k] - f[l_k, l_j]) / (l_i - l_j); where they are close the mean of
    f[l_i, l_i, l_k] and f[l_j, l_j, l_k], up to the square of the gap.
    """
    g, h = (_symmetric(vectors.mT @ x @ vectors) for x in (first, second))
    quotient = loewner(values, function)
    one, other = values.unsqueeze(-1), values.unsqueeze(-2)
    # The rounding of the former and the error of the latter are equal here.
    width = torch.finfo(values.dtype).eps ** (1 / 3)
    is_close = (one - other).abs() <= width * torch.maximum(one.abs(), other.abs())
    gap = torch.where(is_close, 1.0, one - other)
    derivative = quotient.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
    middle = _half_curvature((2 * one + other) / 3, function)
    twice = torch.where(is_close, middle, (derivative - quotient) / gap)
    near = (twice * g) @ h + (twice * h) @ g
    far = (quotient * g) @ h + (quotient * h) @ g
    inner = torch.where(is_close, _symmetric(near), (far - far.mT) / gap)
    return vectors @ inner @ vectors.mT


def _half_curvature(values: Tensor, function: Function) -> Tensor:
    """Return f'' / 2, and 0 at zero."""
    is_zero = values == 0
    size = torch.where(is_zero, 1.0, values.abs())
    if function.power is None:
        curvature = -0.5 / size.square()
    else:
        power = function.power
        curvature = (power * (power - 1) / 2) * size ** (power - 2)
    curvature = torch.where(is_zero, 0.0, curvature)
    return curvature * values.sign() if function.is_odd else curvature


def loewner(values: Float[Tensor, "*batch d"], function: Function) -> Tensor:
    """Return the difference quotients of all pairs of eigenvalues, (*batch, d, d).

    With the larger value a and the smaller a (1 - g) the quotient of a power p is
    a^(p - 1) (1 - (1 - g)^p) / g, exact however small the gap g is. Between two zeros
    it is 0, not infinite. Of an odd function and values of opposite sign it is
    (a^p + b^p) / (a + b).
    """
    power = function.power
    one, other = values.unsqueeze(-1), values.unsqueeze(-2)
    large = torch.maximum(one.abs(), other.abs())
    small = torch.minimum(one.abs(), other.abs())
    is_lone, is_none = small == 0, large == 0
    safe = torch.where(is_none, 1.0, large)
    gap = (safe - small) / safe
    is_equal = gap == 0
    gap = torch.where(is_lone | is_equal, 0.5, gap)
    if power is None:
        scale, limit, lone = 1 / safe, 1.0, safe.log()
        quotient = -torch.log1p(-gap) / gap
    else:
        scale, limit, lone = safe ** (power - 1), power, 1.0
        quotient = -torch.expm1(power * torch.log1p(-gap)) / gap
    quotient = torch.where(is_equal, limit, torch.where(is_lone, lone, quotient))
    if function.is_odd and power is not None:
        ratio = small / safe
        across = (1 + ratio**power) / (1 + ratio)
        quotient = torch.where(one * other < 0, across, quotient)
    return torch.where(is_none, 0.0, scale * quotient)


def _symmetric(x: Tensor) -> Tensor:
    return (x + x.mT) / 2
