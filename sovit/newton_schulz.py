"""Square roots of symmetric matrices by Newton-Schulz iteration (iSQRT-COV).

Only products of matrices: fast wherever those are, and as exact as its number of
iterations allows. `sovit.powers.matrix_power` is the exact root.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from sovit.derivatives import is_recorded
from sovit.moments import by_smaller_side
from sovit.precision import TINY, at_least_float32, autocast_off
from sovit.shapes import Float, Tensor

PRE_NORMS = ("trace", "frobenius")
# On a CPU so many bytes of matrices go through all iterations together: they stay in
# the cache, and their memory is used again instead of being asked for.
CHUNK_BYTES = 2**20


def newton_schulz_sqrt(
    x: Float[Tensor, "*batch d d"], *, num_iterations: int = 5, pre_norm: str = "trace"
) -> Float[Tensor, "*batch d d"]:
    """Approximate the square root of positive semi-definite matrices.

    With A = x / t, where t is the trace of x or its Frobenius norm, the coupled
    iteration

        Y_0 = A,  Z_0 = I,  T = (3 I - Z Y) / 2,  Y <- Y T,  Z <- T Z

    tends to Y = A^(1/2), and the result is sqrt(t) Y_N. iSQRT-COV (arXiv 1712.01034)
    takes the trace and N = 3 to 5, where small eigenvalues come out smaller than their
    root: that is the method, not an error of it. N = 1 is A (3 I - A) / 2.

    Computed is the same polynomial with W = Z Y in Z's place, which has 3 N - 3
    products as well. Its gradient uses that all factors are polynomials of one
    symmetric matrix: 4 N - 3 products instead of autograd's two for each one of the
    forward pass, and 2 N - 2 matrices kept. Where the gradient is differentiated
    itself, it is computed anew from A. NaN and infinity give NaN.

    Only the symmetric part of `x` counts. A matrix that is zero gives zero, with zero
    gradient, where the papers' code divides by zero. Float32 inside, or float64 for
    float64 input; the result keeps that precision. Raises ValueError for settings out
    of range.
    """
    return _iterate(x, num_iterations, pre_norm, inverse=False)


def newton_schulz_inverse_sqrt(
    x: Float[Tensor, "*batch d d"], *, num_iterations: int = 5, pre_norm: str = "trace"
) -> Float[Tensor, "*batch d d"]:
    """Approximate the inverse square root of positive semi-definite matrices.

    Z_N / sqrt(t) of the iteration that `newton_schulz_sqrt` describes, so that
    x times this is that root. Eigenvalues of zero become 1.5^N / sqrt(t).
    """
    return _iterate(x, num_iterations, pre_norm, inverse=True)


def covariance_sqrt(
    x: Float[Tensor, "*batch tokens channels"],
    *,
    num_iterations: int = 5,
    pre_norm: str = "trace",
    centering: str = "channel",
) -> Float[Tensor, "*batch channels channels"]:
    """Approximate the square root of the covariance of a token map.

    The same as `newton_schulz_sqrt` of `sovit.moments.covariance`. Where there are
    fewer tokens N than channels the iteration runs on the N x N Gram matrix of the
    centred tokens X instead: X^T X / N and X X^T / N share their eigenvalues but for
    zeros, so the root is X^T Z X / N with Z the inverse root of the latter. With the 49
    positions of a 7x7 map and 256 channels the iteration is a hundredth of the work.
    """
    settings = {"num_iterations": num_iterations, "pre_norm": pre_norm}
    return by_smaller_side(
        x,
        of_covariance=partial(newton_schulz_sqrt, **settings),
        of_gram=partial(newton_schulz_inverse_sqrt, **settings),
        centering=centering,
    )


def _iterate(
    x: Tensor, num_iterations: int, pre_norm: str, *, inverse: bool
) -> Float[Tensor, "*batch d d"]:
    if num_iterations < 1:
        raise ValueError(
            f"num_iterations must be at least 1, got {num_iterations}: "
            "the papers take 3 to 5."
        )
    if pre_norm not in PRE_NORMS:
        raise ValueError(
            f"pre_norm must be one of {PRE_NORMS}, got {pre_norm!r}: "
            "'trace' is the papers' choice."
        )
    with autocast_off(x.device.type):
        flat = at_least_float32(x).reshape(-1, *x.shape[-2:])
        parts = [flat]
        if flat.device.type == "cpu" and not torch.compiler.is_compiling():
            num_bytes = x.shape[-1] * x.shape[-2] * flat.element_size()
            parts = flat.split(max(CHUNK_BYTES // max(num_bytes, 1), 1))
        roots = [
            _Root.apply(part, num_iterations, pre_norm, inverse)[0]  # pyright: ignore
            for part in parts
        ]
        return torch.cat(roots).reshape(x.shape)


class _Root(torch.autograd.Function):
    """Compute the root, or its inverse, and with it all that the gradient needs.

    That is returned after the root: A and t, then Y_1 (for the inverse W_1 in its
    place), Y_2, W_2, Y_3, W_3 ... up to N - 1. A and t can be differentiated, and the
    gradient is differentiated through them.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Float[Tensor, "b d d"], num_iterations: int, pre_norm: str, inverse: bool
    ) -> tuple[Tensor, ...]:
        size = _size(x, pre_norm)
        a = (x + x.mT) * (0.5 / torch.where(size == 0, 1.0, size))
        y, *kept = _polynomial(a, num_iterations, inverse)
        return y * _scale(size, inverse), a, size, *kept

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _, ctx.num_iterations, ctx.pre_norm, ctx.inverse = inputs
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
                    kept = _polynomial(a, ctx.num_iterations, ctx.inverse)[1:]
                grad = grad * _scale(size, ctx.inverse)
                through_a, pairing = _polynomial_grad(grad, a, kept, ctx.inverse)
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
        towards = a
    factor = 0.0 if of_size is None else of_size
    if of_a is None:
        of_x = factor * towards
    else:
        of_x = of_a / safe + (factor - _inner(of_a, a) / safe) * towards
    return torch.where(is_empty, 0.0, of_x)


def _size(x: Tensor, pre_norm: str) -> Tensor:
    """Return t (..., 1, 1), and 0 for a matrix that counts as zero."""
    if pre_norm == "trace":
        t = x.diagonal(dim1=-2, dim2=-1).sum(-1)
    else:
        t = torch.linalg.matrix_norm((x + x.mT) / 2)
    t = torch.where(t.isfinite(), t, torch.nan)
    # So written, what is no number stays none.
    return torch.where(t <= TINY, 0.0, t)[..., None, None]


def _scale(size: Tensor, inverse: bool) -> Tensor:
    """Return what the iteration's result is multiplied by."""
    is_empty = size == 0
    positive = torch.where(is_empty, 1.0, size)
    scale = positive.rsqrt() if inverse else positive.sqrt()
    return torch.where(is_empty, 0.0, scale)


def _first(a: Tensor) -> Tensor:
    """Return (3 I - a) / 2."""
    return 1.5 * torch.eye(a.shape[-1], dtype=a.dtype, device=a.device) - 0.5 * a


def _step(x: Tensor, w: Tensor) -> Tensor:
    """Return x (3 I - w) / 2."""
    return torch.baddbmm(x, x, w, beta=1.5, alpha=-0.5)


def _polynomial(a: Tensor, num_iterations: int, inverse: bool) -> list[Tensor]:
    """Return Y_N and what came before, as `_Root` lists it."""
    y = first = _first(a) if inverse else _step(a, a)
    if num_iterations == 1:
        return [y]
    w = _step(_step(a, a) if inverse else first, a)
    kept = [w if inverse else first]
    for _ in range(num_iterations - 2):
        y = _step(y, w)
        w = _step(_step(w, w), w)
        kept += [y, w]
    return [_step(y, w), *kept]


def _polynomial_grad(
    grad: Tensor, a: Tensor, kept: list[Tensor], inverse: bool
) -> tuple[Tensor, Tensor]:
    """Return the gradient of a -> Y_N, symmetric, and the product <grad, Y_N>.

    Y_(k+1) = Y_k T_k and W_(k+1) = W_k T_k^2 with T_k = (3 I - W_k) / 2. All of them
    are polynomials of `a`, so they commute, and gradients may be made symmetric,
    or not, wherever that saves a product. For the inverse Y_1 is T_0 instead of a T_0.
    All of this holds for every symmetric `a`, so the gradient of it is the second one.
    """
    ys, ws = kept[1::2], kept[2::2]
    if kept and inverse:
        ys, ws = [_first(a), *ys], [kept[0], *ws]
    elif kept:
        ys, ws = [kept[0], *ys], [_step(kept[0], a), *ws]
    of_w = None
    for y, w in zip(reversed(ys), reversed(ws), strict=True):
        if of_w is None:
            of_w = torch.bmm(y, grad) * -0.5
        else:
            of_w = torch.baddbmm(_cubic_grad(w, of_w), y, grad, alpha=-0.5)
        of_w = _symmetric(of_w)
        grad = _step(grad, w)
    first = ys[0] if ys else (_first(a) if inverse else _step(a, a))
    pairing = _inner(grad, first)
    grad = _symmetric(grad)
    if inverse:
        of_a = grad * -0.5
        if of_w is not None:
            of_a = of_a + _symmetric(_cubic_grad(a, of_w))
        return of_a, pairing
    if of_w is None:
        of_a = torch.baddbmm(grad, a, grad, beta=1.5, alpha=-1)
    else:
        of_a = _cubic_grad(a, of_w, less=grad) + grad * 1.5
    return _symmetric(of_a), pairing


def _cubic_grad(w: Tensor, grad: Tensor, *, less: Tensor | None = None) -> Tensor:
    """Return the gradient of w -> w (3 I - w)^2 / 4, up to its antisymmetric part.

    For symmetric `grad` G it is the symmetric part of w ((M + M^T / 2) / 2 - 3 G) +
    9 G / 4 with M = w G: two products. `less` is taken off beside 3 G.
    """
    product = torch.bmm(w, grad)
    inner = torch.sub(product, grad, alpha=6)
    inner = inner.add(product.mT, alpha=0.5)
    if less is not None:
        inner = inner.sub(less, alpha=2)
    return torch.baddbmm(grad, w, inner, beta=2.25, alpha=0.5)


def _symmetric(x: Tensor) -> Tensor:
    return (x + x.mT) * 0.5


def _inner(x: Tensor, y: Tensor) -> Tensor:
    """Return the inner products of matrices, (..., 1, 1)."""
    return (x * y).sum(dim=(-2, -1), keepdim=True)
