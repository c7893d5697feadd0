"""Square roots of symmetric matrices by Newton-Schulz iteration (iSQRT-COV).

Only products of matrices: fast wherever those are, and as exact as its number of
iterations allows. `sovit.powers.matrix_power` is the exact root.
"""

from __future__ import annotations

from functools import partial
from typing import Any, TypeAlias

import torch

from sovit.derivatives import is_recorded
from sovit.minimax import Coefficients, find_coefficients
from sovit.moments import by_smaller_side
from sovit.precision import TINY, at_least_float32, autocast_off
from sovit.shapes import Float, Number, Tensor

Step: TypeAlias = tuple[float, float]
PRE_NORMS = ("trace", "frobenius", "s4")
# On a CPU so many bytes of matrices go through all iterations together: they stay in
# the cache, and their memory is used again instead of being asked for.
CHUNK_BYTES = 2**20


def newton_schulz_sqrt(
    x: Float[Tensor, "*batch d d"],
    *,
    num_iterations: int = 5,
    pre_norm: str = "trace",
    coefficients: str | Coefficients = "newton_schulz",
    max_gain: Number | None = None,
) -> Float[Tensor, "*batch d d"]:
    """Approximate the square root of positive semi-definite matrices.

    With A = x / t, where t is the trace of x, its Frobenius norm or its Schatten norm
    of order 4, the coupled iteration

        Y_0 = A,  Z_0 = I,  T = a I + b Z Y,  Y <- Y T,  Z <- T Z

    tends to Y = A^(1/2), and the result is sqrt(t) Y_N. iSQRT-COV (arXiv 1712.01034)
    takes a = 3/2, b = -1/2, the trace and N = 3 to 5, where small eigenvalues come out
    smaller than their root: that is the method, not an error of it. N = 1 is
    A (3 I - A) / 2. With coefficients="minimax" each step has a pair of its own, the
    best for its part of an interval: see `sovit.minimax`, also for steps of one's own
    and for `max_gain`. "s4" is (tr x^4)^(1/4), between the largest eigenvalue and the
    Frobenius norm, and needs one product more for the gradient.

    Computed is the same polynomial with W = Z Y in Z's place, W <- W T^2, which has
    3 N - 3 products as well. Its gradient uses that all factors are polynomials of one
    symmetric matrix: 4 N - 3 products instead of autograd's two for each one of the
    forward pass, and 2 N - 2 matrices kept. Where the gradient is differentiated
    itself, it is computed anew from A. NaN and infinity give NaN.

    Only the symmetric part of `x` counts. A matrix that is zero gives zero, with zero
    gradient, where the papers' code divides by zero. Float32 inside, or float64 for
    float64 input; the result keeps that precision. Raises ValueError for settings out
    of range.
    """
    steps = find_coefficients(
        num_iterations, coefficients=coefficients, max_gain=max_gain
    )
    return _iterate(x, steps, pre_norm, inverse=False)


def newton_schulz_inverse_sqrt(
    x: Float[Tensor, "*batch d d"],
    *,
    num_iterations: int = 5,
    pre_norm: str = "trace",
    coefficients: str | Coefficients = "newton_schulz",
    max_gain: Number | None = None,
) -> Float[Tensor, "*batch d d"]:
    """Approximate the inverse square root of positive semi-definite matrices.

    Z_N / sqrt(t) of the iteration that `newton_schulz_sqrt` describes, so that
    x times this is that root. Eigenvalues of zero become `sovit.minimax.gain` of the
    steps, 1.5^N by default, divided by sqrt(t).
    """
    steps = find_coefficients(
        num_iterations, coefficients=coefficients, max_gain=max_gain
    )
    return _iterate(x, steps, pre_norm, inverse=True)


def covariance_sqrt(
    x: Float[Tensor, "*batch tokens channels"],
    *,
    num_iterations: int = 5,
    pre_norm: str = "trace",
    coefficients: str | Coefficients = "newton_schulz",
    max_gain: Number | None = None,
    centering: str = "channel",
) -> Float[Tensor, "*batch channels channels"]:
    """Approximate the square root of the covariance of a token map.

    The same as `newton_schulz_sqrt` of `sovit.moments.covariance`. Where there are
    fewer tokens N than channels the iteration runs on the N x N Gram matrix of the
    centred tokens X instead: X^T X / N and X X^T / N share their eigenvalues but for
    zeros, so the root is X^T Z X / N with Z the inverse root of the latter. With the 49
    positions of a 7x7 map and 256 channels the iteration is a hundredth of the work.
    """
    settings = {
        "num_iterations": num_iterations,
        "pre_norm": pre_norm,
        "coefficients": coefficients,
        "max_gain": max_gain,
    }
    return by_smaller_side(
        x,
        of_covariance=partial(newton_schulz_sqrt, **settings),
        of_gram=partial(newton_schulz_inverse_sqrt, **settings),
        centering=centering,
    )


def _iterate(
    x: Tensor, steps: Coefficients, pre_norm: str, *, inverse: bool
) -> Float[Tensor, "*batch d d"]:
    if pre_norm not in PRE_NORMS:
        raise ValueError(
            f"pre_norm: expected one of {PRE_NORMS}, got {pre_norm!r}; 'trace' is the "
            "papers' choice"
        )
    with autocast_off(x.device.type):
        flat = at_least_float32(x).reshape(-1, *x.shape[-2:])
        parts = [flat]
        if flat.device.type == "cpu" and not torch.compiler.is_compiling():
            num_bytes = x.shape[-1] * x.shape[-2] * flat.element_size()
            parts = flat.split(max(CHUNK_BYTES // max(num_bytes, 1), 1))
        roots = [
            _Root.apply(part, steps, pre_norm, inverse)[0]  # pyright: ignore
            for part in parts
        ]
        return torch.cat(roots).reshape(x.shape)


class _Root(torch.autograd.Function):
    """Root, or its inverse, with all that the gradient needs.

    That is returned after the root: A and t, then Y_1 (for the inverse W_1 in its
    place), Y_2, W_2, Y_3, W_3 ... up to N - 1. A and t can be differentiated, and the
    gradient is differentiated through them.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Float[Tensor, "b d d"], steps: Coefficients, pre_norm: str, inverse: bool
    ) -> tuple[Tensor, ...]:
        a, size, square = _normalized(x, pre_norm)
        y, *kept = _polynomial(a, steps, inverse, square)
        return y * _scale(size, inverse), a, size, *kept

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _, ctx.steps, ctx.pre_norm, ctx.inverse = inputs
        ctx.mark_non_differentiable(*output[3:])
        ctx.save_for_backward(*output[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        grad: Tensor | None,
        of_a: Tensor | None,
        of_size: Tensor | None,
        *_: None,
    ) -> Any:
        a, size, *kept = ctx.saved_tensors
        with autocast_off(a.device.type):
            of_a = None if of_a is None else _symmetric(of_a)
            if grad is not None:
                if is_recorded():
                    kept = _polynomial(a, ctx.steps, ctx.inverse)[1:]
                grad = grad * _scale(size, ctx.inverse)
                through_a, pairing = _polynomial_grad(
                    grad, a, kept, ctx.steps, ctx.inverse
                )
                of_a = through_a if of_a is None else of_a + through_a
                power = -0.5 if ctx.inverse else 0.5
                through_size = power * pairing / torch.where(size == 0, 1.0, size)
                of_size = through_size if of_size is None else of_size + through_size
            of_x = _normalization_grad(of_a, of_size, a, size, ctx.pre_norm)
            return of_x, None, None, None


def _normalization_grad(
    of_a: Tensor | None,
    of_size: Tensor | None,
    a: Tensor,
    size: Tensor,
    pre_norm: str,
) -> Tensor | None:
    """Return the gradient by x, symmetric part t A, of symmetric ones by A and t."""
    if of_a is None and of_size is None:
        return None
    is_empty = size == 0
    safe = torch.where(is_empty, 1.0, size)
    if pre_norm == "trace":
        towards = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    else:
        towards = a if pre_norm == "frobenius" else torch.bmm(torch.bmm(a, a), a)
    factor = 0.0 if of_size is None else of_size
    if of_a is None:
        of_x = factor * towards
    else:
        of_x = of_a / safe + (factor - _inner(of_a, a) / safe) * towards
    return torch.where(is_empty, 0.0, of_x)


def _normalized(x: Tensor, pre_norm: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return A, t (..., 1, 1), and A^2 where t needed it.

    t is 0 for a matrix that counts as zero.
    """
    if pre_norm == "frobenius":
        size = _positive(torch.linalg.matrix_norm((x + x.mT) / 2))
    else:
        size = _positive(x.diagonal(dim1=-2, dim2=-1).sum(-1))
    a = (x + x.mT) * (0.5 / torch.where(size == 0, 1.0, size))
    if pre_norm != "s4":
        return a, size, None
    # By the trace first: small matrices would vanish when they are squared.
    square = torch.bmm(a, a)
    share = torch.linalg.matrix_norm(square).sqrt()[..., None, None]
    inverse = torch.where(size == 0, 1.0, share).reciprocal()
    return a * inverse, size * share, square * inverse.square()


def _positive(t: Tensor) -> Tensor:
    """Return sizes (..., 1, 1) with 0 for what counts as zero."""
    t = torch.where(t.isfinite(), t, torch.nan)
    # Written so that NaN stays NaN.
    return torch.where(t <= TINY, 0.0, t)[..., None, None]


def _scale(size: Tensor, inverse: bool) -> Tensor:
    """Return what the iteration's result is multiplied by."""
    is_empty = size == 0
    positive = torch.where(is_empty, 1.0, size)
    scale = positive.rsqrt() if inverse else positive.sqrt()
    return torch.where(is_empty, 0.0, scale)


def _first(a: Tensor, step: Step) -> Tensor:
    """Return a I + b A."""
    eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    return step[0] * eye + step[1] * a


def _step(x: Tensor, w: Tensor, step: Step) -> Tensor:
    """Return x (a I + b w)."""
    return torch.baddbmm(x, x, w, beta=step[0], alpha=step[1])


def _sum(x: Tensor, square: Tensor, step: Step) -> Tensor:
    """Return x (a I + b x) of what is squared already."""
    return step[0] * x + step[1] * square


def _polynomial(
    a: Tensor, steps: Coefficients, inverse: bool, square: Tensor | None = None
) -> list[Tensor]:
    """Return Y_N and what came before, as `_Root` lists it."""
    start, *rest = steps
    if inverse and not rest:
        return [_first(a, start)]
    product = _step(a, a, start) if square is None else _sum(a, square, start)
    y = first = _first(a, start) if inverse else product
    if not rest:
        return [y]
    w = _step(product, a, start)
    kept = [w if inverse else first]
    for step in rest[:-1]:
        y = _step(y, w, step)
        w = _step(_step(w, w, step), w, step)
        kept += [y, w]
    return [_step(y, w, rest[-1]), *kept]


def _polynomial_grad(
    grad: Tensor, a: Tensor, kept: list[Tensor], steps: Coefficients, inverse: bool
) -> tuple[Tensor, Tensor]:
    """Return the gradient of a -> Y_N, symmetric, and the product <grad, Y_N>.

    Y_(k+1) = Y_k T_k and W_(k+1) = W_k T_k^2 with T_k = a_k I + b_k W_k. All of them
    are polynomials of `a`, so they commute, and gradients may be made symmetric,
    or not, wherever that saves a product. For the inverse Y_1 is T_0 instead of a T_0.
    All of this holds for every symmetric `a`, so the gradient of it is the second one.
    """
    start, *rest = steps
    ys, ws = kept[1::2], kept[2::2]
    if kept and inverse:
        ys, ws = [_first(a, start), *ys], [kept[0], *ws]
    elif kept:
        ys, ws = [kept[0], *ys], [_step(kept[0], a, start), *ws]
    of_w = None
    for y, w, step in zip(reversed(ys), reversed(ws), reversed(rest), strict=True):
        if of_w is None:
            of_w = torch.bmm(y, grad) * step[1]
        else:
            through_w = _cubic_grad(w, of_w, step)
            of_w = torch.baddbmm(through_w, y, grad, alpha=step[1])
        of_w = _symmetric(of_w)
        grad = _step(grad, w, step)
    one_step = _first if inverse else lambda a, step: _step(a, a, step)
    pairing = _inner(grad, ys[0] if ys else one_step(a, start))
    grad = _symmetric(grad)
    if inverse:
        of_a = grad * start[1]
        if of_w is not None:
            of_a = of_a + _symmetric(_cubic_grad(a, of_w, start))
        return of_a, pairing
    if of_w is None:
        of_a = torch.baddbmm(grad, a, grad, beta=start[0], alpha=2 * start[1])
    else:
        of_a = _cubic_grad(a, of_w, start, beside=grad) + grad * start[0]
    return _symmetric(of_a), pairing


def _cubic_grad(
    w: Tensor, grad: Tensor, step: Step, *, beside: Tensor | None = None
) -> Tensor:
    """Return the gradient of w -> w (a I + b w)^2, up to its antisymmetric part.

    For symmetric `grad` G it is the symmetric part of
    w (2 b^2 M + b^2 M^T + 4 a b G) + a^2 G with M = w G: two products. With `beside`
    2 b w times it is added, in the same product.
    """
    a, b = step
    product = torch.bmm(w, grad)
    inner = torch.add(product, grad, alpha=2 * a / b)
    inner = inner.add(product.mT, alpha=0.5)
    if beside is not None:
        inner = inner.add(beside, alpha=1 / b)
    return torch.baddbmm(grad, w, inner, beta=a * a, alpha=2 * b * b)


def _symmetric(x: Tensor) -> Tensor:
    return (x + x.mT) * 0.5


def _inner(x: Tensor, y: Tensor) -> Tensor:
    """Return the inner products of matrices, (..., 1, 1)."""
    return (x * y).sum(dim=(-2, -1), keepdim=True)
