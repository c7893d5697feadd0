"""Check that a second-order network reads its trunk correctly, against timm's own.

Nothing here uses the findings of `sovit.layouts`: they are compared with timm's own map
and head, and with how features and gradients depend on images.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import sovit

# Numbers below these, of the largest, are rounding.
_TINY = 1e-6
_SAME = 1e-4


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Evidence for a reading, and faults found in it."""

    evidence: tuple[str, ...]
    """The parts of timm's own that could be compared, and agree."""

    faults: tuple[str, ...]


def enliven(model: nn.Module, *, images: Tensor) -> nn.Module:
    """Randomise zero-initialised weights, and update norms' statistics on images.

    Otherwise branches get no gradient, and deep activations vanish.
    """
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for param in model.parameters():
            if not param.any():
                param.copy_(0.02 * torch.randn(param.shape, generator=generator))
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.momentum = 1.0
        model.train().forward_features(images)  # pyright: ignore[reportCallIssue]
    return model.eval()


def judge(model: sovit.SecondOrderNet, plain: Any, *, images: Tensor) -> Verdict:
    """Compare a network that pools positions alone with its plain timm trunk."""
    with torch.no_grad():
        given = plain.forward_features(images)
        features = model.forward_features(images)
        skipped = model.features.num_prefix_tokens
        pooled = model.to_tokens(features)[:, skipped:]
    evidence, faults = list[str](), list[str]()
    if features.shape != given.shape or not torch.equal(features, given):
        faults.append("features are not those of timm's model")
    for name, agrees in (
        ("map", _map_agrees(plain, pooled, images=images)),
        ("head", _head_agrees(model, plain, given=given)),
    ):
        if agrees:
            evidence.append(name)
        elif agrees is not None:
            faults.append(f"timm's own {name} has other positions")
    faults += _answers(model, pooled, images=images)
    return Verdict(evidence=tuple(evidence), faults=tuple(faults))


def _map_agrees(plain: Any, pooled: Tensor, *, images: Tensor) -> bool | None:
    """Compare positions with timm's last feature map, if it has the same channels."""
    try:
        with torch.no_grad():
            found = plain.forward_intermediates(
                images, indices=1, norm=True, intermediates_only=True
            )
    except (AttributeError, TypeError, AssertionError, RuntimeError):
        return None
    last = found[-1]
    if not isinstance(last, Tensor) or last.ndim != 4:
        return None
    if last.shape[1] != pooled.shape[2]:
        return None
    tokens = last.flatten(2).mT
    if tokens.shape != pooled.shape:
        return False
    near = _SAME * pooled.abs().max()
    # Some models norm their features and not these: then the number alone can agree.
    return bool((tokens - pooled).abs().max() < near) or None


def _head_agrees(
    model: sovit.SecondOrderNet, plain: Any, *, given: Tensor
) -> bool | None:
    """Compare class token and positions with those that timm's head uses."""
    leaf = given.clone().requires_grad_()
    try:
        out = plain.forward_head(leaf)
        (grad,) = torch.autograd.grad(out.square().sum(), leaf)
    except (AttributeError, TypeError, AssertionError, RuntimeError):
        return None
    size = model.to_tokens(grad).abs().amax((0, 2))
    used = size > 0
    skipped = model.features.num_prefix_tokens
    by_positions = bool(used[skipped:].all())
    by_class = bool(used[:1].all()) and not bool(used[skipped:].any())
    return by_positions or (model.features.has_class_token and by_class)


def _answers(
    model: sovit.SecondOrderNet, pooled: Tensor, *, images: Tensor
) -> list[str]:
    """Find positions, logits and weights that do not depend on the image."""
    faults = list[str]()
    change = (pooled[0] - pooled[1]).abs().amax(-1)
    if not bool((change > _TINY * pooled.abs().max()).all()):
        faults.append("positions do not answer to the image")
    logits = model(images)
    differ = (logits[0] - logits[1]).abs().max()
    if not bool(differ > _TINY * logits.abs().max()):
        faults.append("logits are the same for different images")
    trunk = [p for p in model.backbone.parameters() if p.requires_grad]
    grads = torch.autograd.grad(logits.square().sum(), trunk, allow_unused=True)
    alive = [grad is not None and bool(grad.any()) for grad in grads]
    trained = sum(p.numel() for p, yes in zip(trunk, alive, strict=True) if yes)
    if trained <= sum(p.numel() for p in trunk) / 2:
        faults.append("most of the trunk gets no gradient")
    first = next(n for n, p in enumerate(trunk) if p.ndim > 1 and p.shape[0] > 1)
    if not alive[first]:
        faults.append("the first layer gets no gradient")
    return faults
