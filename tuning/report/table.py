"""Rank the trials of a sweep, and format them as a table.

Trials that finished come first, by the last value of the first metric. Those that did
not follow by the epoch that they reached, and by the value there: asha stops a trial
that is behind others of the same epoch, so one that came further was better, whatever
the values of different epochs. Trials that ended badly, and those without a value,
come last. NaN and infinity are no values.
"""

from __future__ import annotations

import csv
import io
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pipelines.config.overrides import short_tail
from tuning.trials.ledger import BAD, Sweep, TrialRecord
from tuning.trials.options import Mode, Search

_BEST, _FRONT = "*", "+"


def value_of(entry: TrialRecord, metric: str) -> float | None:
    """Return a metric's last value; None where it is missing or not finite."""
    value = entry.last(metric)
    return value if value is not None and math.isfinite(value) else None


def values_of(entry: TrialRecord, metric: str) -> dict[int, float]:
    """Return a metric's finite values by epoch."""
    found = ((round(one["epoch"]), one.get(metric)) for one in entry.reports)
    return {
        epoch: value
        for epoch, value in found
        if value is not None and math.isfinite(value)
    }


def ranked(search: Search, entries: Iterable[TrialRecord]) -> list[TrialRecord]:
    """Sort trials, the best first: see the top of this file."""

    def key(entry: TrialRecord) -> tuple[int, int, float, int]:
        value = value_of(entry, search.metric)
        if entry.status in BAD:
            return 3, 0, 0.0, entry.number
        if value is None:
            return 2, 0, 0.0, entry.number
        is_done = entry.status == "finished"
        epoch = 0 if is_done else entry.epoch
        return 0 if is_done else 1, -epoch, -search.sign * value, entry.number

    return sorted(entries, key=key)


def compared(search: Search, entries: Iterable[TrialRecord]) -> list[TrialRecord]:
    """Keep the trials that have a value and did not end badly, the best first."""
    return [
        entry
        for entry in ranked(search, entries)
        if entry.status not in BAD and value_of(entry, search.metric) is not None
    ]


def winner_of(search: Search, entries: Iterable[TrialRecord]) -> TrialRecord | None:
    """Return the best trial, if any has a value."""
    return next(iter(compared(search, entries)), None)


def front(
    entries: Iterable[TrialRecord], *, metrics: Sequence[str], modes: Sequence[Mode]
) -> list[TrialRecord]:
    """Return the Pareto front: trials that no other dominates.

    Trials that ended badly or lack one of the values are left out.
    """
    signs = [1 if mode == "max" else -1 for mode in modes]
    points: dict[int, tuple[float, ...]] = {}
    found = [entry for entry in entries if entry.status not in BAD]
    for at, entry in enumerate(found):
        values = [value_of(entry, metric) for metric in metrics]
        known = [value for value in values if value is not None]
        if len(known) == len(metrics):
            points[at] = tuple(s * v for s, v in zip(signs, known, strict=True))

    def is_beaten(point: tuple[float, ...]) -> bool:
        return any(
            other != point and all(o >= p for o, p in zip(other, point, strict=True))
            for other in points.values()
        )

    return [found[at] for at, point in points.items() if not is_beaten(point)]


def best_epoch(search: Search, entry: TrialRecord) -> int | None:
    """Find the epoch in which the first metric was best; None without a value."""
    values = values_of(entry, search.metric)
    return max(values, key=lambda epoch: search.sign * values[epoch], default=None)


def short_names(fields: Iterable[str]) -> dict[str, str]:
    """Shorten dotted names to their shortest unique tails."""
    names = list(fields)
    return {name: short_tail(name, among=names) for name in names}


def table(sweep: Sweep, entries: Sequence[TrialRecord]) -> str:
    """Format the trials as lines of text, the best first, with reasons of failures."""
    search = sweep.search
    ordered = ranked(search, entries)
    counts = Counter(entry.status for entry in ordered)
    lines = [
        f"{sweep.name}: {len(ordered)} trials, "
        + ", ".join(f"{num} {status}" for status, num in counts.items()),
        *_aligned(_columns(sweep, ordered)),
    ]
    if winner_of(search, ordered) is not None:
        direction = "most" if search.sign == 1 else "least"
        lines.append(f"{_BEST} the {direction} {search.metric}")
        if len(search.metrics) > 1:
            lines.append(
                f"{_FRONT} no other is better in {' and '.join(search.metrics)}"
            )
    lines += [
        f"trial {entry.number} {entry.status}: {' '.join(entry.reason.split())}"
        for entry in ordered
        if entry.reason
    ]
    return "\n".join(lines)


def _columns(sweep: Sweep, ordered: Sequence[TrialRecord]) -> dict[str, list[str]]:
    search = sweep.search
    num_compared = len(compared(search, ordered))
    columns = {
        "": _marks(search, ordered),
        "rank": [
            str(place) if place <= num_compared else "-"
            for place in range(1, len(ordered) + 1)
        ],
        "trial": [str(entry.number) for entry in ordered],
        "status": [entry.status for entry in ordered],
        "epoch": [str(entry.epoch) if entry.epoch else "-" for entry in ordered],
    }
    for metric in search.metrics:
        columns[metric] = _numbers([entry.last(metric) for entry in ordered])
    epochs = [best_epoch(search, entry) for entry in ordered]
    if any(
        best not in (None, e.epoch) for best, e in zip(epochs, ordered, strict=True)
    ):
        bests = _numbers(
            [
                None if best is None else values_of(entry, search.metric)[best]
                for best, entry in zip(epochs, ordered, strict=True)
            ]
        )
        columns["best (epoch)"] = [
            text if best is None else f"{text} ({best})"
            for text, best in zip(bests, epochs, strict=True)
        ]
    columns["minutes"] = [f"{entry.seconds / 60:.1f}" for entry in ordered]
    for field, name in short_names(sweep.domains).items():
        # A field may be called as a column is.
        shown = f"{name} " if name in columns else name
        columns[shown] = [spelled(entry.setting.get(field, "-")) for entry in ordered]
    return columns


def _marks(search: Search, ordered: Sequence[TrialRecord]) -> list[str]:
    best = winner_of(search, ordered)
    found: list[TrialRecord] = []
    if len(search.metrics) > 1:
        found = front(ordered, metrics=search.metrics, modes=search.modes)
    return [
        (_BEST if entry is best else "") + (_FRONT if entry in found else "")
        for entry in ordered
    ]


def _numbers(values: Sequence[float | None]) -> list[str]:
    """Format a column with one number of decimals: four digits of the largest."""
    sizes = [
        abs(value) for value in values if value is not None and math.isfinite(value)
    ]
    largest = max(sizes, default=0.0)
    digits = math.floor(math.log10(largest)) + 1 if largest > 0 else 1
    decimals = min(max(4 - digits, 0), 6)
    return ["-" if value is None else f"{value:.{decimals}f}" for value in values]


def spelled(value: object) -> str:
    """Format a field's value briefly, for people."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, tuple):
        return "(" + ", ".join(map(spelled, value)) + ")"
    return str(value)


def _aligned(columns: Mapping[str, Sequence[str]]) -> list[str]:
    """Align columns: numbers to the right, the status to the left."""
    set_columns = []
    for head, cells in columns.items():
        width = max(map(len, (head, *cells)))
        side = "<" if head == "status" else ">"
        set_columns.append([f"{cell:{side}{width}}" for cell in (head, *cells)])
    return ["  ".join(row).rstrip() for row in zip(*set_columns, strict=True)]


def as_csv(sweep: Sweep, entries: Sequence[TrialRecord]) -> str:
    """Format the trials as CSV, the best first, with full names and all digits."""
    rows = [
        _row(sweep, entry, rank=rank)
        for rank, entry in enumerate(ranked(sweep.search, entries), start=1)
    ]
    head = list(_row(sweep, TrialRecord(number=0, setting={}), rank=0))
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=head, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _row(sweep: Sweep, entry: TrialRecord, *, rank: int) -> dict[str, Any]:
    search = sweep.search
    best = best_epoch(search, entry)
    values = values_of(entry, search.metric)
    return {
        "rank": rank,
        "trial": entry.number,
        "name": sweep.trial_name(entry.number),
        "status": entry.status,
        "epoch": entry.epoch,
        **{metric: entry.last(metric) for metric in search.metrics},
        f"best {search.metric}": None if best is None else values[best],
        "best epoch": best,
        "seconds": entry.seconds,
        "num_attempts": entry.num_attempts,
        **{field: entry.setting.get(field) for field in sweep.domains},
        "reason": entry.reason,
        "mlflow_run_id": entry.mlflow_run_id,
    }
