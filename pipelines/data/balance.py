"""Class-balanced epochs: how often each row is shown, and in which round of an epoch.

Sampling by n^q (Kang et al., 2020) without its luck: the rows of a class stand in a
fixed, seeded order and are shown in turn, over and over, and every epoch goes on where
the one before ended. So rows of one class are shown equally often, give or take one, in
an epoch and over all epochs, and how often is known beforehand.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

from pipelines.rng import Purpose, key, seeded_order

# Each round reads the whole set. Without, all showings of a row would come in the one
# unit that reads its row group, and a small class in bursts.
_MAX_ROUNDS = 4


class Balance:
    """Balance of a set's classes, the same in every epoch.

    Args:
        labels: Class of each row, (N,).
        exponent: A class of n rows is shown in proportion to n^(1 - exponent).
    """

    def __init__(
        self, labels: np.ndarray, *, exponent: float, num_classes: int, seed: int
    ) -> None:
        self.labels = labels
        self.sizes = np.bincount(labels, minlength=num_classes)
        self.quotas = _quotas(self.sizes, exponent=exponent)
        """int64 (K,): showings of each class in every epoch; N in all."""
        most = int((self.quotas // np.maximum(self.sizes, 1)).max())
        self.num_rounds = min(max(most, 1), _MAX_ROUNDS)
        self._seed = seed

    @functools.cached_property
    def _ranks(self) -> np.ndarray:
        """Place of each row in its class's order: int32 (N,)."""
        num_rows = len(self.labels)
        order = seeded_order(num_rows, key=key(self._seed, Purpose.BALANCE))
        order = order[np.argsort(self.labels[order], kind="stable")]
        firsts = np.cumsum(self.sizes) - self.sizes
        ranks = np.empty(num_rows, np.int32)
        ranks[order] = np.arange(num_rows) - firsts[self.labels[order]]
        return ranks

    def showings(self, epoch: int) -> np.ndarray:
        """Count how often an epoch shows each row: int64 (N,)."""
        rows = slice(None)
        return self._shown(rows, epoch + 1, 0) - self._shown(rows, epoch, 0)

    def group_sizes(self, num_rows: np.ndarray, *, epoch: int) -> np.ndarray:
        """Count the showings of each row group in each round: int64 (rounds, groups).

        Args:
            num_rows: Rows of each group.
        """
        rows, ends = slice(None), np.cumsum(num_rows, dtype=np.int64)
        before = [
            np.concatenate([[0], np.cumsum(self._shown(rows, epoch, part))])
            for part in range(self.num_rounds + 1)
        ]
        return np.diff([sums[ends] - sums[ends - num_rows] for sums in before], axis=0)

    def taken(self, rows: slice, *, epoch: int, part: int) -> np.ndarray:
        """List what a round takes of some rows: int32 (2, n), row and showing of each.

        Rows are counted from the slice's start, their showings from the epoch's.
        """
        first = self._shown(rows, epoch, part)
        counts = self._shown(rows, epoch, part + 1) - first
        firsts = first - self._shown(rows, epoch, 0)
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        showings = np.repeat(firsts, counts) + within
        return np.stack([np.repeat(np.arange(len(counts)), counts), showings]).astype(
            np.int32
        )

    def line(self, classes: Sequence[str]) -> str:
        """Describe in one line what epochs are made of."""
        rates = self.quotas / np.maximum(self.sizes, 1)
        shown = np.flatnonzero(self.sizes)
        most, least = shown[rates[shown].argmax()], shown[rates[shown].argmin()]
        said = (
            f"{classes[at]} ({self.sizes[at]:,} images) {rates[at]:.3g} times"
            for at in (most, least)
        )
        reads = f", in {self.num_rounds} passes over the files"
        return (
            f"balanced epochs of {len(self.labels):,} images: of "
            f"{' and of '.join(said)} each{reads if self.num_rounds > 1 else ''}"
        )

    def _shown(self, rows: slice, epoch: int, part: int) -> np.ndarray:
        """Count the showings of some rows before a round: int64 (n,)."""
        turn = epoch * self.quotas + self.quotas * part // self.num_rounds
        labels = self.labels[rows]
        sizes = self.sizes[labels]
        return (turn[labels] + sizes - 1 - self._ranks[rows]) // sizes


def _quotas(sizes: np.ndarray, *, exponent: float) -> np.ndarray:
    """Share out as many showings as there are rows, by largest remainders."""
    weights = np.where(sizes > 0, np.maximum(sizes, 1.0) ** (1 - exponent), 0.0)
    exact = sizes.sum() * weights / weights.sum()
    quotas = np.floor(exact).astype(np.int64)
    num_left = int(sizes.sum() - quotas.sum())
    quotas[np.argsort(quotas - exact, kind="stable")[:num_left]] += 1
    return quotas
