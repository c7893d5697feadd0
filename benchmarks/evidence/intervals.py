"""Differences of paired seeds, and what can be said of them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy import stats

from tuning.report.statistics import rank_correlation

CONFIDENCE = 0.95
NO_DIFFERENCE = "no difference shown"
ONE_SEED = "one seed, no interval"
NO_PAIR = "no pair"


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Mean of the pairs' differences, and its interval by Student's t."""

    num_pairs: int
    mean: float
    half_width: float | None
    """None for a single pair."""

    @property
    def verdict(self) -> str:
        """Return what the interval shows."""
        if self.half_width is None:
            return ONE_SEED
        if abs(self.mean) <= self.half_width:
            return NO_DIFFERENCE
        return "higher" if self.mean > 0 else "lower"

    @property
    def interval(self) -> str:
        """Format the interval; nothing for a single pair."""
        if self.half_width is None:
            return "-"
        low, high = self.mean - self.half_width, self.mean + self.half_width
        return f"{low:+.2f} to {high:+.2f}"


def paired(
    values: Mapping[int, float], baseline: Mapping[int, float]
) -> Difference | None:
    """Compare the seeds that both have; None where there is none."""
    both = sorted(set(values) & set(baseline))
    return of_differences([values[seed] - baseline[seed] for seed in both])


def rank_text(cheap: Sequence[float], full: Sequence[float]) -> str:
    """Format the rank correlations of pairs, and how far they are spread."""
    spearman, kendall = rank_correlation(cheap, full)
    if math.isnan(spearman):
        return f"{len(cheap)} settings: too few, or too alike, to rank."
    return (
        f"Rank correlation of {len(cheap)} settings: Spearman {spearman:.2f}, Kendall "
        f"{kendall:.2f}; heads alone {min(cheap):.2f} to {max(cheap):.2f} %, in full "
        f"{min(full):.2f} to {max(full):.2f} %."
    )


def of_differences(differences: Sequence[float]) -> Difference | None:
    """Return the mean and its interval; None of nothing."""
    count = len(differences)
    if not count:
        return None
    half_width = None
    if count > 1:
        quantile = float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1))
        half_width = quantile * statistics.stdev(differences) / math.sqrt(count)
    return Difference(
        num_pairs=count, mean=statistics.fmean(differences), half_width=half_width
    )
