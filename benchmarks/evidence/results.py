"""The file of results: an entry a cell, one a line, and what is still to do."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.evidence.plan import RATE_SEED, Cell, Plan, phases

FINISHED, DIVERGED, FAILED = "finished", "diverged", "failed"
Entry = Mapping[str, Any]
Entries = Mapping[str, Entry]
"""By the cells' keys."""


def read_entries(path: Path) -> dict[str, Entry]:
    """Read the file; none is no entries."""
    return json.loads(path.read_text()) if path.exists() else {}


def write_entries(path: Path, entries: Entries) -> None:
    """Write the file, one line a cell, atomically."""
    lines = [
        f"{json.dumps(key)}: {json.dumps(entry)}"
        for key, entry in sorted(entries.items())
    ]
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    partial.replace(path)


def entry_of(cell: Cell, entries: Entries) -> Entry | None:
    """Return a cell's entry, unless it is of other settings than the plan's now."""
    entry = entries.get(cell.key)
    return entry if entry and entry["settings"] == cell.settings() else None


def chosen_rates(plan: Plan, entries: Entries) -> dict[str, float]:
    """Choose each arm's rate: the best of the candidates, once all were tried.

    An arm that diverged at all of them has none.
    """
    found: dict[str, float] = {}
    for name, arm in plan.arms.items():
        if len(plan.rates) == 1:
            found[name] = plan.rates[0]
            continue
        cells = plan.cells(arm.rate_as or name, seed=RATE_SEED, rates=plan.rates)
        tried = [entry_of(cell, entries) for cell in cells]
        top1s = [entry.get("top1", -math.inf) for entry in tried if entry]
        if len(top1s) == len(cells) and max(top1s) > -math.inf:
            found[name] = cells[top1s.index(max(top1s))].rate
    return found


def next_cells(plan: Plan, entries: Entries) -> list[Cell]:
    """Return the cells of the first phase that is not done; failed ones again."""
    for cells in phases(plan, rates=chosen_rates(plan, entries)):
        todo = [
            cell
            for cell in cells
            if (entry := entry_of(cell, entries)) is None or entry["status"] == FAILED
        ]
        if todo:
            return todo
    return []


def counted(plan: Plan, arm: str, entries: Entries) -> dict[int, Entry]:
    """Return an arm's counted entries by seed, at its chosen rate."""
    rates = chosen_rates(plan, entries)
    if arm not in rates:
        return {}
    seeds = range(RATE_SEED + 1, RATE_SEED + 1 + plan.arms[arm].num_seeds)
    cells = [
        cell for s in seeds for cell in plan.cells(arm, seed=s, rates=[rates[arm]])
    ]
    return {cell.seed: entry for cell in cells if (entry := entry_of(cell, entries))}
