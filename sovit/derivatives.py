"""What the hand-written gradients of this package share where they are differentiated.

A hand-written backward pass is fast because it works with what the forward pass kept,
and what was kept knows nothing of the input any more. Where the backward pass is
recorded itself (`create_graph=True`, `torch.func`) it must go by differentiable
operations from the input instead: taking what was kept would drop terms in silence.
"""

from __future__ import annotations

from typing import Any

import torch

from sovit.shapes import Float, Tensor


def is_recorded() -> bool:
    """Return whether the backward pass that asks may be differentiated itself.

    Compiled backward passes may not: PyTorch refuses to differentiate those twice.
    """
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def refuse_derivative(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return `x`, through which nothing may be differentiated any more."""
    result: Tensor = _Refused.apply(x)  # pyright: ignore[reportAssignmentType]
    return result


class _Refused(torch.autograd.Function):
    """Pass a tensor on, and raise where a gradient comes back."""

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
            "Functions of eigenvalues have two derivatives here, a third was wanted: "
            "take Newton-Schulz or svPN, which have all."
        )
