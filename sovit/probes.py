"""Measure how smooth the loss is along its gradient, at the activations of the stem.

"What Deep CNNs Benefit from Global Covariance Pooling: An Optimization Perspective"
(arXiv 2003.11241) compares poolings so. With X the output of the stem and g the
gradient of the loss L there, each step size t gives

    the loss            L(X + t g)
    the gradient change ||g - g(X + t g)||_2, over the whole batch at once

and the narrower the band of either over all t, the smoother the loss. As in the study's
code the step goes up the gradient, and the rest of the network is as it was at X: with
the same weights, and the same draws of dropout and drop path.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import nn
from torch.func import functional_call

from sovit.shapes import Float, Tensor

# The last module of the stem, as timm's families call it, below `backbone.` in ours. A
# ResNet has a bn1 too, so its pooling comes first.
_STEMS = ("maxpool", "patch_embed", "bn1", "stem")
_TRUNKS = ("", "backbone.")
_MAX_NAMES = 40


@dataclass(frozen=True, kw_only=True)
class Probed:
    """Losses and gradient changes of k step sizes, detached."""

    loss: Float[Tensor, ""]
    """Loss at the stem's own output."""
    step_sizes: Float[Tensor, " k"]
    losses: Float[Tensor, " k"]
    gradient_changes: Float[Tensor, " k"]


def probe(
    model: nn.Module,
    images: Float[Tensor, "b c h w"],
    *,
    loss: Callable[[Float[Tensor, "b n"]], Float[Tensor, ""]],
    stem: str,
    step_sizes: Float[Tensor, " k"],
) -> Probed:
    """Measure loss and gradient at steps of the stem's output along the gradient.

    Takes k + 1 forward and backward passes, in the model's mode (training or not).
    Weights, gradients, buffers and random generators are afterwards as they were. Call
    it outside autocast: in bfloat16 the smallest steps are lost beside X.

    Args:
        loss: Computes the scalar loss of logits.
        stem: Name of the module whose output is moved: see `find_stem`.
        step_sizes: Factors of the gradient, of any sign.

    Raises ValueError where there is no such module, or where it does not give one
    tensor once a forward pass.
    """
    rest = _Rest(model, images, loss=loss, stem=stem)
    start = rest(None)
    points = [rest(start.at + t * start.gradient) for t in step_sizes.tolist()]
    changes = [torch.linalg.vector_norm(start.gradient - p.gradient) for p in points]
    return Probed(
        loss=start.loss,
        step_sizes=step_sizes,
        losses=torch.stack([point.loss for point in points]),
        gradient_changes=torch.stack(changes),
    )


@dataclass(frozen=True, kw_only=True)
class _Point:
    """A stem's output, with the loss and its gradient there."""

    at: Float[Tensor, "b ..."]
    loss: Float[Tensor, ""]
    gradient: Float[Tensor, "b ..."]


class _Rest:
    """The loss as a function of the stem's output."""

    def __init__(
        self,
        model: nn.Module,
        images: Float[Tensor, "b c h w"],
        *,
        loss: Callable[[Float[Tensor, "b n"]], Float[Tensor, ""]],
        stem: str,
    ) -> None:
        modules = dict(model.named_modules())
        if not stem or stem not in modules:
            raise ValueError(_text(repr(stem), model))
        self._model, self._images, self._loss = model, images, loss
        self._stem, self._name = modules[stem], stem
        # Detached, weights get no gradients, and the stem needs none.
        self._weights = {name: p.detach() for name, p in model.named_parameters()}

    def __call__(self, at: Float[Tensor, "b ..."] | None) -> _Point:
        """Compute the loss and its gradient `at` a stem's output, or at its own."""
        leaves: list[Tensor] = []

        def replace(module: nn.Module, args: object, output: object) -> Tensor:
            if not isinstance(output, Tensor):
                raise ValueError(_text(f"{self._name!r}, of several outputs", module))
            leaf = (output.detach() if at is None else at).requires_grad_()
            leaves.append(leaf)
            return leaf.clone()  # what follows may work in place

        hook = self._stem.register_forward_hook(replace)
        try:
            with _same_draws(self._images.device), torch.enable_grad():
                logits = functional_call(self._model, self._state(), (self._images,))
                if len(leaves) != 1:
                    what = f"{self._name!r}, which runs {len(leaves)} times"
                    raise ValueError(_text(what, self._model))
                loss = self._loss(logits)
                (gradient,) = torch.autograd.grad(loss, leaves)
        finally:
            hook.remove()
        return _Point(at=leaves[0].detach(), loss=loss.detach(), gradient=gradient)

    def _state(self) -> dict[str, Tensor]:
        """Return the weights, and copies of buffers, since BatchNorm updates them."""
        buffers = {name: b.clone() for name, b in self._model.named_buffers()}
        return self._weights | buffers


def _same_draws(device: torch.device) -> AbstractContextManager[None]:
    """Fork the random generators, so that every pass has the same draws."""
    if device.type == "cpu":
        return torch.random.fork_rng(devices=[])
    return torch.random.fork_rng(devices=[device], device_type=device.type)


def find_stem(model: nn.Module, *, name: str = "") -> str:
    """Find the module that ends the stem of a timm model, or of one of ours.

    That is the max-pooling of a ResNet, the first activation of a MobileNetV2, and the
    patch embedding of a transformer; or the module called `name`. Raises ValueError,
    listing the modules, where a model has none of these.
    """
    modules = dict(model.named_modules())
    usual = (f"{trunk}{stem}" for stem in _STEMS for trunk in _TRUNKS)
    found = next((one for one in (name, *usual) if one and one in modules), None)
    if found is None or (name and found != name):
        what = repr(name) if name else "none of a known family"
        raise ValueError(_text(what, model))
    return found


def _text(what: str, model: nn.Module) -> str:
    names = [name for name, _ in model.named_modules() if 0 < len(name.split(".")) < 4]
    shown = ", ".join(filter(None, names[: _MAX_NAMES + 1]))
    return (
        f"stem: expected the name of a module that gives one tensor, got {what}; set "
        f"one of {type(model).__name__}'s: {shown}"
    )
