"""Micro-batches, which the data side passes to the loop."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One worker's micro-batch on its device."""

    images: Tensor
    """float32 or bfloat16 (B, 3, H, W), normalised; see `loader.image_dtype`."""
    labels: Tensor
    """int64 (B,)."""
    weights: Tensor
    """float32 (B,): 1 for an image, 0 for a padding row."""
    draw_ids: np.ndarray
    """int64 (B,): draw ids, an image of the set and its repetition:
    row * num_repeats + repetition; -1 where the weight is 0."""
    num_bad: int = 0
    """Images of these rows that could not be decoded; their weight is 0."""
    epoch: int
    index: int
    """Index of the global batch within the epoch."""
    micro: int
    """Index of the micro-batch within this worker's share."""
    global_rows: int
    """Images of the global batch, over all workers."""
    ends_step: bool
    """Whether it is the share's last micro-batch."""
    ends_epoch: bool
    """Whether it belongs to the epoch's last batch."""
