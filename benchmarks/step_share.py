"""Measure the second-order head's share of a network's training step.

The step is computed as a run computes it: bfloat16 autocast where the device has
instructions for it, channels last, a fused optimiser.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch.nn.functional import cross_entropy

import sovit  # noqa: F401  (registers the networks)
from benchmarks.timing import call_ms
from pipelines.hardware.device import has_bfloat16

_NUM_ROUNDS = 5


@dataclass(frozen=True, kw_only=True)
class Share:
    """Median times of a step, and of the head within it."""

    model: str
    batch_size: int
    dtype: str
    """That products of the network are computed in."""
    step_ms: float
    """Forward, backward and AdamW of the whole network."""
    head_ms: float
    """Forward and backward of the head on the same features, classifier included."""
    pooling_ms: float
    """Of the pooling alone, without the classifier."""


def measure_share(
    name: str,
    *,
    batch_size: int,
    device: str,
    img_size: int = 224,
    settings: Mapping[str, Any] | None = None,
) -> Share:
    """Time a step, the head and the pooling of a network of ours, in turns.

    Args:
        settings: Of the network; one of tokens must be told its `img_size` too.
    """
    torch.manual_seed(0)
    in_half = has_bfloat16(torch.device(device))
    autocast = torch.autocast(device, torch.bfloat16, enabled=in_half)
    model: Any = timm.create_model(name, num_classes=1000, **(settings or {}))
    model.train().to(device).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    images = torch.randn(batch_size, 3, img_size, img_size, device=device)
    images = images.to(memory_format=torch.channels_last)
    labels = torch.randint(0, 1000, (batch_size,), device=device)
    with torch.no_grad(), autocast:
        features = model.forward_features(images)
        tokens = model.to_tokens(features) if hasattr(model, "to_tokens") else features
    tokens = tokens[:, getattr(model.head, "num_prefix_tokens", 1) :]

    def step() -> None:
        with autocast:
            logits = model(images)
        cross_entropy(logits, labels).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def head() -> None:
        with autocast:
            logits = model.forward_head(features.clone().requires_grad_())
        cross_entropy(logits, labels).backward()
        optimizer.zero_grad(set_to_none=True)

    def pooling() -> None:
        with autocast:
            pooled = model.head.pool(tokens.clone().requires_grad_())
        pooled.sum().backward()
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
        dtype="bfloat16" if in_half else "float32",
        step_ms=medians[0],
        head_ms=medians[1],
        pooling_ms=medians[2],
    )
