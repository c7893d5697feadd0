"""Draw differences with their intervals, and the course of trainings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.evidence.intervals import NO_DIFFERENCE, ONE_SEED, Difference
from benchmarks.evidence.plan import Plan
from benchmarks.evidence.rows import Row

_DOTS_PER_INCH = 110
_BAND = ("_min", "_max")


def draw_claims(path: Path, claims: Sequence[tuple[Plan, Row]]) -> None:
    """Draw the main difference of every plan, with its interval."""
    labels = [f"{plan.name}: {row.arm}\nagainst {row.against}" for plan, row in claims]
    found = [row.difference for _, row in claims if row.difference]
    _draw(path, found, labels=labels)


def draw_differences(path: Path, rows: Sequence[Row]) -> None:
    """Draw a plan's differences, with their intervals."""
    shown = [row for row in rows if row.difference]
    labels = [f"{row.arm}\nagainst {row.against}" for row in shown]
    _draw(path, [row.difference for row in shown if row.difference], labels=labels)


def _draw(path: Path, found: Sequence[Difference], *, labels: Sequence[str]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 1.2 + 0.45 * len(found)), layout="constrained")
    axes = figure.subplots()
    colours = {NO_DIFFERENCE: "gray", ONE_SEED: "gray"}
    for place, one in enumerate(found):
        is_single = one.half_width is None
        axes.errorbar(
            one.mean,
            place,
            xerr=one.half_width,
            fmt="x" if is_single else "o",
            capsize=3,
            color=colours.get(one.verdict, "C0"),
        )
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(labels)), labels, fontsize="small")
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel(
        "points of top-1, with the 95 % interval (gray: none shown; x: one seed)"
    )
    figure.savefig(path, dpi=_DOTS_PER_INCH)


def draw_curves(path: Path, rows: Sequence[Row], *, metrics: Sequence[str]) -> bool:
    """Draw the course of metrics, each arm's mean over its seeds, all in one picture.

    Of NAME_min and NAME_max the band between them is drawn. Returns whether there was
    anything to draw.
    """
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(metric.removesuffix(_BAND[0]) for metric in metrics))
    names = [name for name in names if not name.endswith(_BAND[1])]
    curves = {row.arm: _mean_curves(row, metrics=metrics) for row in rows}
    if not any(curves.values()):
        return False
    figure = Figure(figsize=(8, 2.8 * len(names)), layout="constrained")
    for axes, name in zip(
        np.atleast_1d(figure.subplots(len(names))), names, strict=True
    ):
        for number, (arm, found) in enumerate(curves.items()):
            low, high = (found.get(f"{name}{end}") for end in _BAND)
            colour = f"C{number}"
            if low is not None and high is not None:
                axes.fill_between(
                    low[0], low[1], high[1], alpha=0.3, color=colour, label=arm
                )
            elif name in found:
                axes.plot(*found[name], marker=".", color=colour, label=arm)
        axes.set(ylabel=name, xlabel="step")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=_DOTS_PER_INCH)
    return True


def _mean_curves(row: Row, *, metrics: Sequence[str]) -> Mapping[str, Any]:
    """Return steps and means of the seeds that finished, by metric."""
    found = {}
    for metric in metrics:
        curves = [
            np.array(it["curves"][metric]).T
            for it in row.entries.values()
            if it.get("curves", {}).get(metric)
        ]
        if curves:
            num = min(curve.shape[1] for curve in curves)
            values = np.mean([curve[1, :num] for curve in curves], axis=0)
            found[metric] = (curves[0][0, :num], values)
    return found
