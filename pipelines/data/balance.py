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
        """Count how often an epoch shows each row: int32 (N,)."""
        return self.before_rounds(epoch)[-1]

    def before_rounds(self, epoch: int) -> np.ndarray:
        """Count an epoch's showings of each row before each round, and in all.

        Returns int32 (num_rounds + 1, N).
        """
        sizes = self.sizes[self.labels]
        bounds = range(self.num_rounds + 1)
        turns = [
            epoch * self.quotas + self.quotas * r // self.num_rounds for r in bounds
        ]
        shown = [
            (turn[self.labels] + sizes - 1 - self._ranks) // sizes for turn in turns
        ]
        return np.stack([now - shown[0] for now in shown]).astype(np.int32)

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


def group_sizes(shown: np.ndarray, num_rows: np.ndarray) -> np.ndarray:
    """Count the showings of each row group in each round: int64 (rounds, groups).

    Args:
        shown: As of `Balance.before_rounds`.
        num_rows: Rows of each group.
    """
    ends = np.cumsum(num_rows, dtype=np.int64)
    before = [np.concatenate([[0], np.cumsum(of, dtype=np.int64)]) for of in shown]
    return np.diff([sums[ends] - sums[ends - num_rows] for sums in before], axis=0)


def taken(shown: np.ndarray) -> np.ndarray:
    """List what a round takes of some rows: int32 (2, n), row and showing of each.

    Args:
        shown: Showings of the rows before the round and after it, (2, num_rows).
    """
    counts = shown[1] - shown[0]
    rows = np.repeat(np.arange(len(counts)), counts)
    firsts = np.cumsum(counts) - counts
    showings = np.arange(len(rows)) + (shown[0] - firsts)[rows]
    return np.stack([rows, showings]).astype(np.int32)


def _quotas(sizes: np.ndarray, *, exponent: float) -> np.ndarray:
    """Share out as many showings as there are rows, by largest remainders."""
    weights = np.where(sizes > 0, np.maximum(sizes, 1.0) ** (1 - exponent), 0.0)
    exact = sizes.sum() * weights / weights.sum()
    quotas = np.floor(exact).astype(np.int64)
    num_left = int(sizes.sum() - quotas.sum())
    quotas[np.argsort(quotas - exact, kind="stable")[:num_left]] += 1
    return quotas
