"""Accumulate evaluation results on the device; no batch waits for it.

Everything has a fixed size, and workers' sums are reduced once, when asked for.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from pipelines.config import Data
from pipelines.evaluation.report import Confusions, Worst

MAX_CLASSES = 4096
"""Beyond this many classes pairs are not counted: 64 MiB on the device."""
PICTURE_PIXELS = 112
"""Maximum side of the pictures of the worst images."""
_NOTHING = -torch.inf


@dataclass(frozen=True, kw_only=True)
class Seen:
    """A batch's rows and the model's predictions for them; tensors are (B,)."""

    images: Tensor
    """(B, 3, H, W), normalised."""
    labels: Tensor
    weights: Tensor
    rows: Tensor
    """int64: row ids in the set; -1 where the weight is 0."""
    losses: Tensor
    predictions: Tensor
    probabilities: Tensor
    """Of the predictions."""


class RealSums:
    """Top-1 against ImageNet's ReaL labels (arXiv 2006.07159).

    Args:
        labels: int64 (rows of the set, n): each row's labels, -1 where it has no more;
            images without any are left out.
    """

    def __init__(self, labels: Tensor) -> None:
        self._labels = labels
        self._sums = torch.zeros(2, dtype=torch.float64, device=labels.device)

    def add(self, seen: Seen) -> None:
        """Add a batch."""
        found = self._labels[seen.rows.clamp(min=0)]
        right = (found == seen.predictions[:, None]).any(dim=1)
        has_any = (found >= 0).any(dim=1)
        columns = torch.stack([right, has_any]).double()
        self._sums += (columns * seen.weights).sum(dim=1)

    def total(self) -> tuple[float | None, int]:
        """Reduce over all workers to top-1 in percent and its images: a collective.

        Top-1 is None where there is no such image.
        """
        if dist.is_initialized():
            dist.all_reduce(self._sums)
        right, num_images = self._sums.tolist()
        return 100 * right / num_images if num_images else None, round(num_images)


class ConfusionSums:
    """Counts of label by prediction; only right and wrong past MAX_CLASSES."""

    def __init__(self, num_classes: int, *, device: torch.device) -> None:
        self._has_pairs = num_classes <= MAX_CLASSES
        width = num_classes if self._has_pairs else 2
        self._counts = torch.zeros(
            (num_classes, width), dtype=torch.int32, device=device
        )

    def add(self, seen: Seen) -> None:
        """Add a batch."""
        columns = seen.predictions
        if not self._has_pairs:
            columns = (seen.predictions == seen.labels).long()
        places = seen.labels * self._counts.shape[1] + columns
        # Not bincount: it waits for the device to know how long its result is.
        self._counts.view(-1).index_add_(0, places, seen.weights.int())

    def total(self, classes: tuple[str, ...]) -> Confusions:
        """Reduce the counts over all workers: a collective."""
        if dist.is_initialized():
            dist.all_reduce(self._counts)
        counts = self._counts.cpu().numpy().astype(np.int64)
        return Confusions(
            classes=classes,
            num_images=counts.sum(axis=1),
            num_right=(counts.diagonal() if self._has_pairs else counts[:, 1]).copy(),
            pairs=_pairs(counts) if self._has_pairs else None,
        )


def _pairs(counts: np.ndarray) -> np.ndarray:
    wrong = counts.copy()
    np.fill_diagonal(wrong, 0)
    labels, predictions = np.nonzero(wrong)
    found = np.stack([labels, predictions, wrong[labels, predictions]], axis=1)
    return found[np.argsort(-found[:, 2], kind="stable")]


class WorstSoFar:
    """Images of the highest loss seen so far.

    Args:
        num: How many.
        img_size: Height and width of the images.
        data: Says how they were normalised.
    """

    def __init__(
        self, num: int, *, img_size: int, data: Data, device: torch.device
    ) -> None:
        size = min(img_size, PICTURE_PIXELS)
        self._num = num
        # Rows of loss, label, prediction, probability and place in the set; float64
        # holds every one of them exactly.
        self._table = torch.zeros((num, 5), dtype=torch.float64, device=device)
        self._table[:, 0] = _NOTHING
        self._pixels = torch.zeros(
            (num, size, size, 3), dtype=torch.uint8, device=device
        )
        self._scale = 255 * torch.tensor(data.std, device=device)
        self._offset = 255 * torch.tensor(data.mean, device=device)

    def add(self, seen: Seen) -> None:
        """Add a batch."""
        if not self._num:
            return
        lost = torch.where(seen.weights > 0, seen.losses.double(), _NOTHING)
        places = lost.topk(min(self._num, len(lost))).indices
        columns = (
            lost,
            seen.labels,
            seen.predictions,
            seen.probabilities,
            seen.rows,
        )
        table = torch.stack([column.double() for column in columns], dim=1)[places]
        table = torch.cat([self._table, table])
        pixels = torch.cat([self._pixels, self._shrunk(seen.images[places])])
        kept = _highest(table[:, 0], num=self._num)
        self._table, self._pixels = table[kept], pixels[kept]

    def total(self) -> Worst:
        """Find the worst over all workers, the same on each: a collective."""
        table, pixels = self._table, self._pixels
        if dist.is_initialized() and self._num:
            table, pixels = self._over_workers()
        is_one = table[:, 0] != _NOTHING
        losses, labels, predictions, probabilities, rows = table[is_one].cpu().numpy().T
        return Worst(
            losses=losses,
            labels=labels.astype(np.int64),
            predictions=predictions.astype(np.int64),
            probabilities=probabilities,
            row_ids=rows.astype(np.int64),
            pixels=pixels[is_one].cpu().numpy(),
        )

    def _over_workers(self) -> tuple[Tensor, Tensor]:
        """Find the worst of all workers; whoever holds one contributes its pixels."""
        tables = [torch.empty_like(self._table) for _ in range(dist.get_world_size())]
        dist.all_gather(tables, self._table)
        table = torch.cat(tables)
        kept = _highest(table[:, 0], num=self._num)
        own = kept - dist.get_rank() * self._num
        is_own = (own >= 0) & (own < self._num)
        pixels = torch.zeros_like(self._pixels)
        pixels[is_own] = self._pixels[own[is_own]]
        dist.all_reduce(pixels)
        return table[kept], pixels

    def _shrunk(self, images: Tensor) -> Tensor:
        size = self._pixels.shape[1]
        if images.shape[-1] > size:
            images = functional.adaptive_avg_pool2d(images, size)
        levels = images.permute(0, 2, 3, 1) * self._scale + self._offset
        return levels.round().clamp(0, 255).to(torch.uint8)


def _highest(losses: Tensor, *, num: int) -> Tensor:
    """Return the places of the highest losses, the first of equal ones first."""
    return losses.sort(descending=True, stable=True).indices[:num]
