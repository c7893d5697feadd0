"""The loss and its weights; metrics summed on the device, copied only on request."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

# For classes, of the published values the one for sets of tens of thousands of images.
BETA = 0.9999
NO_VOTES: Mapping[str, bool] = MappingProxyType({})


def correct(logits: Tensor, labels: Tensor, *, k: int) -> Tensor:
    """Check for each image whether its label is among the k best: bool (B,)."""
    best = logits.topk(min(k, logits.shape[1]), dim=1).indices
    return (best == labels[:, None]).any(dim=1)


class MetricSums:
    """Sums of weighted loss, top-1, top-5 and images, kept on the device."""

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(4, dtype=torch.float64, device=device)
        self._num_bad = 0

    def add(
        self,
        logits: Tensor,
        labels: Tensor,
        weights: Tensor,
        loss: Tensor,
        *,
        num_bad: int = 0,
    ) -> None:
        """Add a batch: logits (B, K), labels, weights and losses (B,)."""
        self._num_bad += num_bad
        logits = logits.detach()
        columns = torch.stack(
            [
                loss.detach(),
                correct(logits, labels, k=1).to(loss.dtype),
                correct(logits, labels, k=5).to(loss.dtype),
                torch.ones_like(loss),
            ]
        )
        self._sums += (columns * weights).sum(dim=1)

    def state(self) -> tuple[Tensor, int]:
        """Copy the sums, for `restore`."""
        return self._sums.clone(), self._num_bad

    def restore(self, state: tuple[Tensor, int]) -> None:
        """Return to sums of `state`: what was added since does not count."""
        self._sums, self._num_bad = state[0].clone(), state[1]

    def total(self, *, votes: Mapping[str, bool] = NO_VOTES) -> dict[str, float]:
        """Reduce over all workers, return means, and reset.

        A collective: every worker must call this at the same step, with votes of the
        same names. Under each name it returns the number of workers that voted so.
        """
        counts = torch.tensor([self._num_bad, *votes.values()], dtype=torch.float64)
        sums = torch.cat([self._sums, counts.to(self._sums.device)])
        self._sums.zero_()
        self._num_bad = 0
        if dist.is_initialized():
            dist.all_reduce(sums)
        loss, top1, top5, num_images, num_bad, *given = sums.tolist()
        count = max(num_images, 1.0)
        return {
            "loss": loss / count,
            "top1": 100 * top1 / count,
            "top5": 100 * top5 / count,
            "num_images": num_images,
            "num_bad": num_bad,
        } | dict(zip(votes, given, strict=True))


def smooth_targets(labels: Tensor, *, num_classes: int, smoothing: float) -> Tensor:
    """Convert labels (B,) to distributions (B, K): smoothing / K off the label."""
    off = smoothing / num_classes
    targets = torch.full(
        (len(labels), num_classes), off, device=labels.device, dtype=torch.float32
    )
    return targets.scatter_(1, labels[:, None], 1 - smoothing + off)


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Compute each image's cross-entropy (B,) against a distribution (B, K)."""
    return -(targets * F.log_softmax(logits.float(), dim=1)).sum(dim=1)


def class_weights(
    counts: np.ndarray, *, kind: Literal["inverse", "effective"]
) -> Tensor:
    """Compute the weight of each class in the loss from its number of training images.

    `inverse` is 1 / n; `effective` is (1 - b) / (1 - b^n), the inverse of a class's
    effective number of images (Cui et al., 2019), with b = 0.9999. Both are scaled so
    that the mean over all images, not over classes, is 1: the learning rate means the
    same with weights as without.

    Args:
        counts: int64 (K,). A class without images gets the weight 0.

    Returns:
        float32 (K,).
    """
    num = np.maximum(counts, 1).astype(np.float64)
    if kind == "inverse":
        weights = 1 / num
    else:
        weights = (1 - BETA) / -np.expm1(num * np.log(BETA))
    weights[counts == 0] = 0
    mean = (weights * counts).sum() / counts.sum()
    return torch.from_numpy((weights / mean).astype(np.float32))
