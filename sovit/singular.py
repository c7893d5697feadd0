"""Powers of singular values of matrices of any shape, with derivatives everywhere."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from sovit.derivatives import is_recorded
from sovit.precision import at_least_float32, autocast_off
from sovit.shapes import Float, Number, Tensor
from sovit.spectral import Function, loewner, only_finite, spectral_derivative


def singular_power(
    x: Float[Tensor, "*batch m n"], power: Number
) -> Float[Tensor, "*batch m n"]:
    """Raise singular values to a power over 0: U diag(s^power) V^T.

    Its derivatives are those of a function of the eigenvalues s and -s of the symmetric
    matrix [[0, x], [x^T, 0]]: finite where singular values are equal or zero, which
    those of `torch.linalg.svd` are not. See `sovit.spectral` for what else holds.
    """
    with autocast_off(x.device.type):
        result, *_ = _Power.apply(at_least_float32(x), float(power))  # pyright: ignore
        return result


class _Power(torch.autograd.Function):
    """Power of the singular values, with the decomposition."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, power: float) -> tuple[Tensor, ...]:
        x, is_finite = only_finite(x)
        u, s, vh = torch.linalg.svd(x, full_matrices=False)
        floor = s[..., :1] * (max(x.shape[-2:]) * torch.finfo(x.dtype).eps)
        s = torch.where(is_finite, torch.where(s > floor, s, 0.0), torch.nan)
        return (u * (s**power).unsqueeze(-2)) @ vh, u, s, vh

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, ctx.power = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(x, *output[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor | None, *_: None
    ) -> tuple[Tensor | None, None]:
        if grad is None:
            return None, None
        x, u, s, vh = ctx.saved_tensors
        with autocast_off(x.device.type):
            if is_recorded():
                function = Function(ctx.power, is_odd=True)
                whole = spectral_derivative(_embed(x), _embed(grad), function)
                return whole[..., : x.shape[-2], x.shape[-2] :], None
            return _grad(grad, u, s, vh, ctx.power), None


def _embed(x: Tensor) -> Tensor:
    """Return [[0, x], [x^T, 0]]."""
    num_rows, num_columns = x.shape[-2:]
    padded = functional.pad(x, (num_rows, 0, 0, num_columns))
    return padded + padded.mT


def _grad(grad: Tensor, u: Tensor, s: Tensor, vh: Tensor, power: float) -> Tensor:
    """Return the derivative in a direction, from the thin decomposition.

    In its basis the symmetric part of the direction meets eigenvalues of one sign, the
    antisymmetric part those of both, and what is outside of it s and zero.
    """
    inner = u.mT @ grad @ vh.mT
    powered = s**power
    total = s.unsqueeze(-1) + s.unsqueeze(-2)
    across = powered.unsqueeze(-1) + powered.unsqueeze(-2)
    across = torch.where(total == 0, 0.0, across / torch.where(total == 0, 1.0, total))
    along = loewner(s, Function(power))
    mean, half = (along + across) / 2, (along - across) / 2
    core = mean * inner + half * inner.mT
    ratio = across.diagonal(dim1=-2, dim2=-1)
    if grad.shape[-2] > grad.shape[-1]:
        outside = (grad @ vh.mT - u @ inner) * ratio.unsqueeze(-2)
        return (u @ core + outside) @ vh
    outside = (u.mT @ grad - inner @ vh) * ratio.unsqueeze(-1)
    return u @ (core @ vh + outside)
