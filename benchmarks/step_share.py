"""Measure what part of a network's training step its second-order head takes."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

import timm
import torch

import sovit  # noqa: F401  (registers the networks)
from benchmarks.timing import call_ms

_IMG_SIZE = 224
_NUM_ROUNDS = 5


@dataclass(frozen=True, kw_only=True)
class Share:
    """Hold the times of a step and of the head within it, medians."""

    model: str
    batch_size: int
    step_ms: float
    """Forward, backward and AdamW of the whole network."""
    head_ms: float
    """Forward and backward of the head on the same features, classifier included."""
    pooling_ms: float
    """Of the pooling alone, without the classifier."""


def measure_share(name: str, *, batch_size: int, device: str) -> Share:
    """Time a step, the head and the pooling of a network of ours, in turns."""
    torch.manual_seed(0)
    model: Any = timm.create_model(name, num_classes=1000).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    images = torch.randn(batch_size, 3, _IMG_SIZE, _IMG_SIZE, device=device)
    labels = torch.randint(0, 1000, (batch_size,), device=device)
    with torch.no_grad():
        features = model.forward_features(images)
    tokens = model.to_tokens(features) if hasattr(model, "to_tokens") else features
    tokens = tokens[:, getattr(model.head, "num_prefix_tokens", 1) :]

    def step() -> None:
        torch.nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def head() -> None:
        leaf = features.clone().requires_grad_()
        torch.nn.functional.cross_entropy(model.forward_head(leaf), labels).backward()
        optimizer.zero_grad(set_to_none=True)

    def pooling() -> None:
        model.head.pool(tokens.clone().requires_grad_()).sum().backward()
        optimizer.zero_grad(set_to_none=True)

    parts = (step, head, pooling)
    rounds = [
        [call_ms(part, device=device) for part in parts] for _ in range(_NUM_ROUNDS + 1)
    ]
    # The first round warms up.
    medians = [statistics.median(times) for times in zip(*rounds[1:], strict=True)]
    return Share(
        model=name,
        batch_size=batch_size,
        step_ms=medians[0],
        head_ms=medians[1],
        pooling_ms=medians[2],
    )
