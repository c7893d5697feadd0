"""Powers of singular values by power iteration: svPN, So-ViT's fast normalisation.

Power iteration finds a few singular triplets, their values are raised to a power, and
what is left is scaled by the last of them. `sovit.powers.sv_power` is the exact power.
"""

from __future__ import annotations

from typing import Any

import torch

from sovit.derivatives import is_recorded
from sovit.precision import TINY, at_least_float32, autocast_off, matmul
from sovit.shapes import Float, Number, Tensor

# Added to the divisor of the remainder, as in the papers' code.
REMAINDER_EPS = 1e-5


def svpn(
    x: Float[Tensor, "*batch m n"],
    start: Float[Tensor, " n"],
    *,
    power: Number = 0.5,
    num_iterations: int = 1,
    num_singular_values: int | None = 1,
    eps: Number = REMAINDER_EPS,
) -> Float[Tensor, "*batch m n"]:
    """Raise the singular values of `x` to a power, by power iteration (svPN).

    With triplets (s_i, u_i, v_i), i = 1..r, each found in `num_iterations` steps from
    the same `start` on what the earlier ones left, the result is

        sum_i s_i^power u_i v_i^T  +  remainder / (s_r^(1 - power) + eps).

    So-ViT (arXiv 2104.10935) and SoT (v2 of it) use r = 1 and one iteration.
    `num_singular_values=None` takes all min(m, n), which leaves no remainder.

    For r = 1 the sum collapses to x / s^(1 - power) up to `eps`, and is computed so.
    Unlike the released code no derivative is infinite: a power is only ever taken of a
    positive number, directions within rounding of zero add nothing and leave what is
    left to the last one found, and a map that is zero stays zero.

    One iteration never finds a second direction: the first step leaves nothing along
    `start`. More singular values then give the result of one; take two iterations.

    Float32 inside, or float64 for float64 input; the result keeps that precision.
    Raises ValueError for settings out of range.
    """
    _check_settings(power, num_iterations)
    limit = min(x.shape[-2:])
    count = limit if num_singular_values is None else num_singular_values
    if not 1 <= count <= limit:
        raise ValueError(
            f"num_singular_values: expected a number between 1 and {limit} for "
            f"matrices of {tuple(x.shape[-2:])}, got {num_singular_values}; lower it, "
            "or give None for all"
        )
    with autocast_off(x.device.type):
        matrix = at_least_float32(x)
        vector = start.to(matrix.dtype)
        if num_singular_values == 1:
            return _scale_by_first(matrix, vector, power, num_iterations, eps)
        return _deflate(matrix, vector, power, num_iterations, count, eps)


def _scale_by_first(
    matrix: Tensor, start: Tensor, power: Number, num_iterations: int, eps: Number
) -> Tensor:
    """Apply svPN with one singular value: a scalar for each matrix, exactly.

    s^power u v^T + (A - s u v^T) / d with d = s^(1 - power) + eps is A / d plus
    s^power (eps / d) u v^T, whatever u and v are.
    """
    if num_iterations == 1:
        flat = matrix.reshape(-1, *matrix.shape[-2:])
        scaled, *_ = _OneStep.apply(flat, start, power, eps)  # pyright: ignore
        return scaled.reshape(matrix.shape)
    s, u, v = _triplet(matrix, start, num_iterations)
    scale = _inverse(s, power, eps)
    result = matrix * scale
    if eps:
        weight = _power(s, power) * scale * eps
        result = result + (weight.squeeze(-1) * u).unsqueeze(-1) * v.unsqueeze(-2)
    return result


class _OneStep(torch.autograd.Function):
    """Scaling by the first singular value after one iteration, the papers' setting.

    Its gradient is written out: a handful of products with vectors, where autograd has
    each step of the power iteration to go back through.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        matrix: Float[Tensor, "b m n"],
        start: Float[Tensor, " n"],
        power: Number,
        eps: Number,
    ) -> tuple[Tensor, ...]:
        return _one_step(matrix, start, power, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        matrix, start, ctx.power, ctx.eps = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(matrix, start, *output[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor | None, *_: None
    ) -> tuple[Tensor | None, ...]:
        if grad is None:
            return None, None, None, None
        matrix, start, *found = ctx.saved_tensors
        with autocast_off(matrix.device.type):
            if is_recorded():
                found = list(_one_step(matrix, start, ctx.power, ctx.eps)[1:])
            grads = _one_step_grad(grad, matrix, start, found, ctx.power, ctx.eps)
            return *grads, None, None


def _one_step(
    matrix: Tensor, start: Tensor, power: Number, eps: Number
) -> tuple[Tensor, ...]:
    """Return the scaled matrix, and what its gradient needs."""
    mapped = matrix @ start
    size = torch.linalg.vector_norm(mapped, dim=-1, keepdim=True)
    # What is next to zero stays so: it is divided by no less than TINY.
    inverse_size = size.clamp(min=TINY).reciprocal()
    u = mapped * inverse_size
    projected = torch.bmm(u.unsqueeze(-2), matrix).squeeze(-2)
    s = torch.linalg.vector_norm(projected, dim=-1, keepdim=True)
    positive, safe = s > TINY, s.clamp(min=TINY)
    v = projected / safe
    powered = safe**power
    scale = torch.where(positive, powered / safe.add(powered, alpha=eps), 1.0)
    left = (powered * scale * positive * u).unsqueeze(-1)
    scaled = matrix * scale.unsqueeze(-1)
    result = torch.addcmul(scaled, left, v.unsqueeze(-2), value=eps)
    return result, inverse_size, u, s, v, scale, powered


def _one_step_grad(
    grad: Tensor,
    matrix: Tensor,
    start: Tensor,
    found: list[Tensor],
    power: Number,
    eps: Number,
) -> tuple[Tensor, Tensor]:
    """Return the gradients by matrix and start.

    With c the scale, P = s^power and w = eps P c: dc/ds = (power - 1) c^2 / P and
    dw/ds = power w / s + eps P dc/ds.
    """
    inverse_size, u, s, v, scale, powered = found
    positive = s > TINY
    scaled = powered * scale * positive
    over_s = eps * scaled / s.clamp(min=TINY)
    # Faster on a CPU than a batched product with a column.
    grad_v = (grad * v.unsqueeze(-2)).sum(-1)
    grad_u = torch.bmm(u.unsqueeze(-2), grad).squeeze(-2)
    along = (u * grad_v).sum(-1, keepdim=True)
    inner = (grad * matrix).sum(dim=(-2, -1)).unsqueeze(-1)
    slope = (inner / powered).add(along, alpha=eps)
    slope = slope * scale.square() * positive
    # What comes back to A^T u, then to A v_0.
    row = (power - 1) * torch.addcmul(slope, over_s, along) * v
    row = torch.addcmul(row, over_s, grad_u)
    column = (matrix * row.unsqueeze(-2)).sum(-1)
    column = torch.addcmul(column, scaled, grad_v, value=eps)
    inside = (u * column).sum(-1, keepdim=True)
    column = torch.addcmul(column, inside, u, value=-1) * inverse_size
    of_start = torch.bmm(column.unsqueeze(-2), matrix).sum(dim=(0, 1))
    of_matrix = grad * scale.unsqueeze(-1)
    of_matrix = of_matrix.addcmul(u.unsqueeze(-1), row.unsqueeze(-2))
    return of_matrix.addcmul(column.unsqueeze(-1), start), of_start


def _deflate(
    matrix: Tensor,
    start: Tensor,
    power: float,
    num_iterations: int,
    count: int,
    eps: float,
) -> Tensor:
    """Apply svPN with any number of singular values, one after the other."""
    # What is left of a matrix of lower rank is rounding: its directions mean nothing,
    # and the power would magnify them.
    size = torch.linalg.matrix_norm(matrix.detach())[..., None, None]
    floor = (size * max(matrix.shape[-2:]) * torch.finfo(matrix.dtype).eps).clamp(TINY)
    result, last = torch.zeros_like(matrix), torch.zeros_like(floor)
    for _ in range(count):
        s, u, v = _triplet(matrix, start, num_iterations, floor.squeeze(-1))
        missing = s <= floor
        last = torch.where(missing, last, s)
        outer = u.unsqueeze(-1) * v.unsqueeze(-2)
        result = result + torch.where(missing, 0.0, _power(s, power)) * outer
        matrix = matrix - torch.where(missing, 0.0, s) * outer
    return result + matrix * _inverse(last, power, eps)


def _triplet(
    matrix: Tensor, start: Tensor, num_iterations: int, floor: Tensor | float = TINY
) -> tuple[Tensor, Tensor, Tensor]:
    """Estimate the first singular triplet: s (..., 1, 1), u (..., m), v (..., n).

    They are zero where the matrix maps the start to `floor` times its length or less.
    """
    v = start.expand(*matrix.shape[:-2], start.shape[-1])
    u, projected = v, v
    for _ in range(num_iterations):
        length = torch.linalg.vector_norm(v.detach(), dim=-1, keepdim=True)
        u = _unit(matmul(matrix, v.unsqueeze(-1)).squeeze(-1), floor * length)
        projected = matmul(u.unsqueeze(-2), matrix).squeeze(-2)
        v = _unit(projected, floor)
    s = torch.linalg.vector_norm(projected, dim=-1)
    return s[..., None, None], u, v


# Conditions are written so that NaN is never taken for zero.


def _unit(vector: Tensor, floor: Tensor | float) -> Tensor:
    """Scale to length one; a vector of length `floor` or less becomes zero."""
    norm = torch.linalg.vector_norm(vector, dim=-1, keepdim=True)
    is_short = norm <= floor
    return torch.where(is_short, 0.0, vector / torch.where(is_short, 1.0, norm))


def _power(s: Tensor, power: Number) -> Tensor:
    """Return s^power where s is positive and 0 elsewhere, with a finite derivative."""
    is_zero = s <= TINY
    return torch.where(is_zero, 0.0, torch.where(is_zero, 1.0, s) ** power)


def _inverse(s: Tensor, power: Number, eps: Number) -> Tensor:
    """Return 1 / (s^(1 - power) + eps), and 1 where there is nothing to divide by."""
    is_zero = s <= TINY
    divisor = torch.where(is_zero, 1.0, s) ** (1 - power) + eps
    return torch.where(is_zero, 1.0, 1 / divisor)


def _check_settings(power: Number, num_iterations: int) -> None:
    if not 0 < power <= 1:
        raise ValueError(
            f"power: expected over 0 and at most 1, got {power}; 0.5 is the papers' "
            "value"
        )
    if num_iterations < 1:
        raise ValueError(
            f"num_iterations: expected at least 1, got {num_iterations}; 1 is the "
            "papers' value"
        )
