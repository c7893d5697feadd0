"""Weights of classes in the loss, for training sets with classes of unequal size."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

# Of the published values the one for sets of tens of thousands of images.
BETA = 0.9999


def class_weights(
    counts: np.ndarray, *, kind: Literal["inverse", "effective"]
) -> Tensor:
    """Compute the weight of each class from its number of training images.

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
