"""Report the rounds of `benchmarks.ingest` as a table, and as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import pandas as pd

from benchmarks.machine import busy_text
from benchmarks.timing import Round, Spread, ratios, spread

OURS = "ours"
Rounds = Mapping[str, Sequence[Round]]


def ours_to_others(rounds: Rounds) -> dict[str, Spread]:
    """Return our rate as a multiple of every other's; empty if ours did not run."""
    ours = [found.images_per_s for found in rounds.get(OURS, [])]
    return {
        name: ratios(ours, [found.images_per_s for found in of_loader])
        for name, of_loader in rounds.items()
        if ours and name != OURS
    }


def as_json(rounds: Rounds) -> dict[str, Any]:
    """Return all rounds, and the table's figures."""
    compared = ours_to_others(rounds)
    return {
        name: {
            **{
                figure: asdict(spread([getattr(found, figure) for found in of_loader]))
                for figure in ("images_per_s", "images_per_cpu_s", "first_batch_s")
            },
            "ours_to_this": asdict(compared[name]) if name in compared else None,
            "rounds": [asdict(found) for found in of_loader],
        }
        for name, of_loader in rounds.items()
    }


def table(rounds: Rounds) -> str:
    """Format a line per loader, the fastest first."""
    shown = {}
    for name, of in as_json(rounds).items():
        ours = of["ours_to_this"]
        shown[name] = {
            "images/s": Spread(**of["images_per_s"]).shown(".0f"),
            "images/CPU-s": f"{of['images_per_cpu_s']['median']:.0f}",
            "first batch": f"{of['first_batch_s']['median']:.1f} s",
            "ours is": f"{Spread(**ours).shown('.2f')} x" if ours else "",
        }
    order = sorted(
        rounds,
        key=lambda name: -spread([it.images_per_s for it in rounds[name]]).median,
    )
    lines = pd.DataFrame(shown).T.loc[order].to_string()
    others = [found.other_cores for of_loader in rounds.values() for found in of_loader]
    return f"{lines}\n{busy_text(others)}"
