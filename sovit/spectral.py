"""Functions of the eigenvalues of symmetric matrices, and where these are found."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from sovit.precision import at_least_float32, autocast_off
from sovit.shapes import Float, Tensor

PLACEMENTS = ("auto", "device", "host")
# Since this version PyTorch decomposes a batch on a GPU in one call, whatever its size.
# Before, matrices above the other size went one after the other (pytorch 175403).
BATCHED_SINCE = "2.12"
BATCHED_SIZE = 32


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
            f"placement must be one of {PLACEMENTS}, got {placement!r}: "
            "'auto' decides by the version of PyTorch."
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
    x: Float[Tensor, "*batch d d"], power: float | None, *, placement: str
) -> Float[Tensor, "*batch d d"]:
    """Apply a power, or the logarithm for None, to the eigenvalues."""
    with autocast_off(x.device.type):
        matrix = at_least_float32(x)
        result, *_ = _Spectral.apply(matrix, power, placement)  # pyright: ignore
        return result


class _Spectral(torch.autograd.Function):
    """Apply a function to eigenvalues, with Loewner's matrix in the gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, power: float | None, placement: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        values, vectors = symmetric_eig((x + x.mT) / 2, placement=placement)
        floor = values[..., -1:] * x.shape[-1] * torch.finfo(x.dtype).eps
        values = torch.where(values > floor.clamp(min=0), values, 0.0)
        positive = torch.where(values > 0, values, 1.0)
        applied = positive.log() if power is None else positive**power
        applied = torch.where(values > 0, applied, 0.0)
        result = (vectors * applied.unsqueeze(-2)) @ vectors.mT
        return result, values, vectors

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _, ctx.power, _ = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*output[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor | None, *_: None
    ) -> tuple[Tensor | None, None, None]:
        if grad is None:
            return None, None, None
        values, vectors = ctx.saved_tensors
        with autocast_off(values.device.type):
            grad = (grad + grad.mT) / 2
            inner = vectors.mT @ grad @ vectors
            inner = inner * _loewner(values, ctx.power)
            return vectors @ inner @ vectors.mT, None, None


def _loewner(values: Float[Tensor, "*batch d"], power: float | None) -> Tensor:
    """Return the difference quotients of all pairs of eigenvalues, (*batch, d, d).

    With the larger value a and the smaller a (1 - g) the quotient of a power p is
    a^(p - 1) (1 - (1 - g)^p) / g, exact however small the gap g is.
    """
    one, other = values.unsqueeze(-1), values.unsqueeze(-2)
    large, small = torch.maximum(one, other), torch.minimum(one, other)
    some, both = large > 0, small > 0
    safe = torch.where(some, large, 1.0)
    gap = (safe - small) / safe
    equal = gap == 0
    gap = torch.where(both & ~equal, gap, 0.5)
    if power is None:
        scale, limit, lone = 1 / safe, 1.0, safe.log()
        quotient = -torch.log1p(-gap) / gap
    else:
        scale, limit, lone = safe ** (power - 1), power, torch.ones_like(safe)
        quotient = -torch.expm1(power * torch.log1p(-gap)) / gap
    quotient = torch.where(equal, limit, torch.where(both, quotient, lone))
    return torch.where(some, scale * quotient, 0.0)
