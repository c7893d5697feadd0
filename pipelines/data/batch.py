"""Micro-batches, which the data side passes to the loop, and its position."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from pipelines.hardware.device import upload


@dataclass(frozen=True, kw_only=True)
class Position:
    """Next global batch to train on."""

    epoch: int = 0
    batch: int = 0
    """Batches of this epoch already trained on."""
    step: int = 0
    """Batches of all epochs already trained on."""


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
    """int64 (B,): draw ids, an image of the set and its repetition, as of
    `sampling.draw_ids_of`; -1 where the weight is 0."""
    num_bad: int = 0
    """Images that could not be decoded, each once an epoch; their weight is 0."""
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

    @property
    def num_rows(self) -> int:
        """Number of rows, padding included."""
        return len(self.draw_ids)

    def parts(self, num_parts: int) -> Iterator[Batch]:
        """Cut into micro-batches of one shape: those of a plan with so many more.

        Rows that pad a part show its images again, as the decoder pads; only of a part
        without any image the padding differs from the decoder's, which weighs nothing.
        """
        if num_parts == 1:
            yield self
            return
        size = math.ceil(self.num_rows / num_parts)
        for part in range(num_parts):
            yield replace(
                self._rows(part * size, size),
                num_bad=self.num_bad if part == 0 else 0,
                micro=self.micro * num_parts + part,
                ends_step=self.ends_step and part == num_parts - 1,
            )

    def _rows(self, start: int, size: int) -> Batch:
        own = self.draw_ids[start : start + size]
        ids = np.concatenate([own, np.full(size - len(own), -1, np.int64)])
        shown = _shown(ids, start=start, end=self.num_rows)
        if np.array_equal(shown, np.arange(start, start + size)):
            # Views: a copy of the images would take memory that there is little of.
            cut = slice(start, start + size)
            images, weights = self.images[cut], self.weights[cut]
            labels = self.labels[cut]
        else:
            device = self.labels.device
            places = upload(torch.from_numpy(shown), device)
            images, labels = _taken(self.images, places), self.labels[places]
            weights = torch.from_numpy((ids >= 0).astype(np.float32))
            weights = upload(weights, device)
        return replace(
            self, images=images, labels=labels, weights=weights, draw_ids=ids
        )


def _taken(images: Tensor, places: Tensor) -> Tensor:
    """Select images, in the memory format that they have."""
    taken = images.index_select(0, places)
    if images.is_contiguous(memory_format=torch.channels_last):
        return taken.contiguous(memory_format=torch.channels_last)
    return taken


def _shown(ids: np.ndarray, *, start: int, end: int) -> np.ndarray:
    """Find the row of a batch that each row of a part shows: its own, or a good one."""
    good = np.flatnonzero(ids >= 0)
    if not len(good):
        return np.minimum(start + np.arange(len(ids)), end - 1)
    shown = good[np.arange(len(ids)) % len(good)]
    shown[good] = good
    return start + shown
