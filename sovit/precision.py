"""Keep second-order mathematics in float32 whatever the precision around it.

A covariance sums a few hundred products and its power divides by a small number: half
precision loses both. Everything here is float32, or float64 where the input is.
What PyTorch may round in a float32 product (TF32) is left to its own setting:
docs/second_order.md has the errors.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from sovit.shapes import Float, Tensor

# Norms, traces and singular values at or under this count as zero: the papers' code
# divides by no less.
TINY = 1e-12


def autocast_off(device_type: str) -> AbstractContextManager[Any]:
    """Return a context without autocast, if the device has one at all."""
    # By name, since torch.compile breaks the graph in 2.11's is_autocast_available.
    if device_type == "meta":
        return nullcontext()
    return torch.autocast(device_type, enabled=False)


def at_least_float32(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return `x` in float32, or as it is where it is float64."""
    return x if x.dtype == torch.float64 else x.float()


class _Matmul(torch.autograd.Function):
    """Matrix product outside autocast, also where `backward()` is called inside it."""

    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor, b: Tensor) -> Tensor:
        with autocast_off(a.device.type):
            return a @ b

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor]:
        a, b = ctx.saved_tensors
        (grad,) = grad_outputs
        with autocast_off(a.device.type):
            return grad @ b.mT, a.mT @ grad


def matmul(
    a: Float[Tensor, "*batch m k"], b: Float[Tensor, "*batch k n"]
) -> Float[Tensor, "*batch m n"]:
    """Multiply two batches of matrices in their own precision, forward and backward.

    Autocast never lowers either direction. PyTorch's own product is lowered in the
    backward pass where `backward()` is called under autocast.
    """
    product: Tensor = _Matmul.apply(a, b)  # pyright: ignore[reportAssignmentType]
    return product


class _Solve(torch.autograd.Function):
    """Linear solve outside autocast, also where `backward()` is called inside it."""

    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor, b: Tensor) -> Tensor:
        # `torch.linalg.solve`, which raises, would wait for the device.
        return torch.linalg.solve_ex(a, b).result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0], output)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor]:
        a, x = ctx.saved_tensors
        of_b = solve(a.mT, grad_outputs[0])
        return -matmul(of_b, x.mT), of_b


def solve(
    a: Float[Tensor, "*batch m m"], b: Float[Tensor, "*batch m k"]
) -> Float[Tensor, "*batch m k"]:
    """Solve a x = b in its own precision, forward and backward: see `matmul`.

    Where `a` has no inverse the result has NaN or infinity in it.
    """
    x: Tensor = _Solve.apply(a, b)  # pyright: ignore[reportAssignmentType]
    return x
