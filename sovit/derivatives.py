"""Helpers for hand-written gradients that are themselves differentiated.

A hand-written backward pass is fast because it uses tensors that the forward pass
saved, and those are detached from the input. Where the backward pass is recorded
itself (`create_graph=True`, `torch.func`) it must go by differentiable operations from
the input instead: the saved tensors would silently drop terms.
"""

from __future__ import annotations

from typing import Any

import torch

from sovit.shapes import Float, Tensor


def is_recorded() -> bool:
    """Check whether the current backward pass may itself be differentiated.

    Compiled backward passes may not: PyTorch refuses to differentiate those twice.
    """
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def refuse_derivative(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return `x`, which can't be differentiated any further."""
    result: Tensor = _Refused.apply(x)  # pyright: ignore[reportAssignmentType]
    return result


class _Refused(torch.autograd.Function):
    """Identity that raises when a gradient comes back."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        raise RuntimeError(
            "expected at most two derivatives of a function of eigenvalues, got a "
            "third; take Newton-Schulz or svPN, which have all"
        )
