"""The rows of a plan's table: an arm's seeds, and its difference to its baseline."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.evidence.intervals import Difference, of_differences, paired
from benchmarks.evidence.plan import RATE_SEED, Plan
from benchmarks.evidence.results import (
    DIVERGED,
    FAILED,
    Entries,
    Entry,
    chosen_rates,
    counted,
    entry_of,
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """What was measured of an arm."""

    arm: str
    against: str
    rate: float | None
    """None where it is not chosen yet, or no candidate trained."""
    num_wanted: int
    entries: Mapping[int, Entry]
    """Counted, by seed; those that ended badly too."""
    difference: Difference | None
    """Of top-1 to the baseline's, in points."""
    mce: Difference | None
    """Mean corruption error less the baseline's 100 %."""
    tried: Mapping[float, Entry]
    """By the candidates of the rate; empty where another arm's is taken."""

    @property
    def top1s(self) -> list[float]:
        """Return top-1 of the seeds that finished."""
        return list(_top1s(self.entries).values())

    @property
    def top1_text(self) -> str:
        """Format mean and sample deviation."""
        if not self.top1s:
            return "-"
        mean = f"{statistics.fmean(self.top1s):.2f}"
        if len(self.top1s) == 1:
            return mean
        return f"{mean} ± {statistics.stdev(self.top1s):.2f}"

    @property
    def seeds_text(self) -> str:
        """Format how many seeds were measured, and how many ended badly."""
        text = f"{len(self.entries)} of {self.num_wanted}"
        for status in (DIVERGED, FAILED):
            count = sum(it["status"] == status for it in self.entries.values())
            text += f", {count} {status}" if count else ""
        return text


def rows_of(plan: Plan, entries: Entries) -> list[Row]:
    """Return a row for each arm."""
    rates = chosen_rates(plan, entries)
    found = {arm: counted(plan, arm, entries) for arm in plan.arms}
    rows = []
    for name, arm in plan.arms.items():
        of_baseline = found.get(arm.against, {})
        tried = {
            cell.rate: entry
            for cell in plan.cells(name, seed=RATE_SEED, rates=plan.rates)
            if (entry := entry_of(cell, entries))
        }
        rows.append(
            Row(
                arm=name,
                against=arm.against,
                rate=rates.get(name),
                num_wanted=arm.num_seeds,
                entries=found[name],
                difference=paired(_top1s(found[name]), _top1s(of_baseline)),
                mce=_mce(found[name], of_baseline),
                tried=tried,
            )
        )
    return rows


def _top1s(entries: Mapping[int, Entry]) -> dict[int, float]:
    return {seed: it["top1"] for seed, it in entries.items() if "top1" in it}


def _mce(
    entries: Mapping[int, Entry], baseline: Mapping[int, Entry]
) -> Difference | None:
    """Return mCE relative to the baseline of the same seed, less 100."""
    both = [
        (entries[seed]["errors"], baseline[seed]["errors"])
        for seed in sorted(set(entries) & set(baseline))
        if "errors" in entries[seed] and "errors" in baseline[seed]
    ]
    return of_differences(
        [
            statistics.fmean(100 * own[name] / other[name] for name in own) - 100
            for own, other in both
            if math.prod(other.values()) > 0
        ]
    )
