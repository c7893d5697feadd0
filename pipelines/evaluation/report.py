"""Results of an evaluation by class and by image; no torch, so that they can travel."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Confusions:
    """Confusion counts: images of each class, and which classes they were taken for."""

    classes: tuple[str, ...]
    num_images: np.ndarray
    """int64 (K,)."""
    num_right: np.ndarray
    """int64 (K,)."""
    pairs: np.ndarray | None
    """int64 (n, 3): class, the other that it was taken for, and how often, the most
    often first; None where there are too many classes to count pairs of."""

    @property
    def top1(self) -> float:
        """Top-1 of all images in percent."""
        return 100 * float(self.num_right.sum()) / max(int(self.num_images.sum()), 1)

    @property
    def balanced_top1(self) -> float:
        """Mean of the classes' recalls in percent: each class counts alike.

        Of classes that the set has images of, as scikit-learn's balanced accuracy is.
        """
        has_any = self.num_images > 0
        recalls = self.num_right[has_any] / self.num_images[has_any]
        return 100 * float(recalls.mean()) if len(recalls) else 0.0

    def matrix(self) -> np.ndarray:
        """Build the confusion matrix as int64 (K, K): class by prediction."""
        assert self.pairs is not None
        matrix = np.diag(self.num_right)
        matrix[self.pairs[:, 0], self.pairs[:, 1]] = self.pairs[:, 2]
        return matrix


@dataclass(frozen=True, kw_only=True)
class Worst:
    """Images of the highest loss, the worst first; arrays are (n,)."""

    losses: np.ndarray
    labels: np.ndarray
    predictions: np.ndarray
    probabilities: np.ndarray
    """Of the predictions."""
    row_ids: np.ndarray
    """Row ids in the set."""
    pixels: np.ndarray
    """uint8 (n, H, W, 3): as the model sees them, downscaled."""
    keys: Mapping[int, str] = dataclasses.field(default_factory=dict)
    """Names of the images by row, where they were looked up."""

    def __len__(self) -> int:
        return len(self.row_ids)

    def name_of(self, at: int) -> str:
        """Name an image: by its key, or by its row."""
        row = int(self.row_ids[at])
        return self.keys.get(row, f"row {row}")


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything that the tables and pictures of an evaluation are made of."""

    confusions: Confusions
    worst: Worst

    def named(self, keys: Mapping[int, str]) -> Report:
        """Return a copy with the names of the worst images."""
        worst = dataclasses.replace(self.worst, keys=dict(keys))
        return dataclasses.replace(self, worst=worst)
