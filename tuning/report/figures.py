"""Draw what a sweep found: settings, trade-offs, importances, and ranks foretold."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tuning.entries import Entry, Sweep
from tuning.options import Mode
from tuning.report.parallel import draw_parallel
from tuning.report.statistics import MIN_PAIRS, importances, rank_correlation
from tuning.report.table import compared, front, short_names, value_of

__all__ = ["draw_importances", "draw_parallel", "draw_pareto", "draw_ranks"]

_DOTS_PER_INCH = 110
_INCHES = (9.2, 5.2)
_RATES = ("train/images_per_s", "head/images_per_s")
_FONT_SIZE = 9
_GRID = {"color": "0.9", "linewidth": 0.8}
_FRONT_COLOR = "crimson"
_POINT_COLOR = "tab:blue"
_PALE = 0.35


def draw_pareto(sweep: Sweep, entries: Sequence[Entry], path: Path) -> None:
    """Draw the first metric over the second as a PNG, with the front of the best.

    Over the images a second where only one metric is looked for. Trials that did not
    finish are pale: they stand where they were stopped.
    """
    x_metric, x_mode = _second(sweep, entries)
    y_metric, y_mode = sweep.search.metric, sweep.search.modes[0]
    found = compared(sweep.search, entries)
    points = {
        one.number: (x, y)
        for one in found
        if (x := value_of(one, x_metric)) is not None
        and (y := value_of(one, y_metric)) is not None
    }
    best = front(found, metrics=(y_metric, x_metric), modes=(y_mode, x_mode))
    on_front = {one.number: points[one.number] for one in best}
    pale = {one.number for one in found if one.status != "finished"}
    figure, place = _figure()
    place.set_title(
        f"{sweep.name}: {len(points)} trials, {len(best)} on the front", fontsize=11
    )
    place.set_xlabel(f"{x_metric} ({_better(x_mode)})")
    place.set_ylabel(f"{y_metric} ({_better(y_mode)})")
    edge = sorted(on_front.values())
    place.plot([x for x, _ in edge], [y for _, y in edge], color=_FRONT_COLOR)
    for number, (x, y) in points.items():
        place.scatter(
            x,
            y,
            s=60 if number in on_front else 36,
            color=_FRONT_COLOR if number in on_front else _POINT_COLOR,
            alpha=_PALE if number in pale else 1,
            linewidths=0,
            zorder=3,
        )
    _draw_key(figure, place, has_pale=not pale.isdisjoint(points))
    _name_points(figure, place, on_front, points=list(points.values()))
    figure.savefig(path, dpi=_DOTS_PER_INCH, format="png")


def _second(sweep: Sweep, entries: Sequence[Entry]) -> tuple[str, Mode]:
    """Name the metric that the first is drawn over."""
    search = sweep.search
    if len(search.metrics) > 1:
        return search.metrics[1], search.modes[1]
    for rate in _RATES:
        if any(value_of(entry, rate) is not None for entry in entries):
            return rate, "max"
    return _RATES[0], "max"


def _better(mode: Mode) -> str:
    return "more is better" if mode == "max" else "less is better"


def _draw_key(figure: Any, place: Any, *, has_pale: bool) -> None:
    """Say what the colours mean."""
    shown = [
        (_FRONT_COLOR, 1.0, "no other is better in both"),
        (_POINT_COLOR, 1.0, "others"),
    ]
    if has_pale:
        shown.append((_POINT_COLOR, _PALE, "pale: did not finish"))
    for color, alpha, label in shown:
        place.scatter([], [], s=40, color=color, alpha=alpha, linewidths=0, label=label)
    figure.legend(
        fontsize=_FONT_SIZE, loc="outside lower center", ncols=3, frameon=False
    )


def draw_importances(
    sweep: Sweep,
    entries: Sequence[Entry],
    path: Path,
    *,
    found: tuple[int, Mapping[str, float]] | None = None,
) -> None:
    """Draw how much each field mattered as bars in a PNG.

    Args:
        found: What `importances` gave, which takes seconds; worked out if None.
    """
    epoch, shares = importances(sweep, entries) if found is None else found
    names = short_names(sweep.domains)
    figure, place = _figure(height=1.4 + 0.45 * max(len(shares), 3))
    num = len(compared(sweep.search, entries))
    place.set_title(
        f"{sweep.name}: what {sweep.search.metric} in epoch {epoch} depends on "
        f"({num} trials)",
        fontsize=11,
    )
    if not shares:
        _say(place, f"{num} trials, or all of one value: too few to tell")
    else:
        bars = place.barh(
            [names[field] for field in shares],
            [100 * share for share in shares.values()],
            color=_POINT_COLOR,
        )
        place.bar_label(bars, fmt="%.0f %%", padding=4, fontsize=_FONT_SIZE)
        place.invert_yaxis()
        place.set_xlim(0, 112)
        place.set_xticks(range(0, 101, 20))
        place.set_xlabel("share of its variance that the field explains (%), by fANOVA")
        place.grid(visible=False, axis="y")
    figure.savefig(path, dpi=_DOTS_PER_INCH, format="png")


def draw_ranks(
    cheap: Sequence[float],
    full: Sequence[float],
    path: Path,
    *,
    numbers: Sequence[int],
    names: tuple[str, str] = ("head/top1", "val/top1"),
) -> None:
    """Draw values of a full training over those of a cheap one as a PNG.

    Args:
        numbers: The trials', beside their points.
        names: Of the two values.
    """
    spearman, kendall = rank_correlation(cheap, full)
    figure, place = _figure()
    points = {
        number: (x, y)
        for x, y, number in zip(cheap, full, numbers, strict=True)
        if math.isfinite(x) and math.isfinite(y)
    }
    said = f"Spearman {spearman:.2f}, Kendall {kendall:.2f}"
    if math.isnan(spearman):
        said = (
            f"ranks of fewer than {MIN_PAIRS} say nothing"
            if len(points) < MIN_PAIRS
            else "all of one value: no ranks"
        )
    place.set_title(f"{len(points)} trials: {said}", fontsize=11)
    place.set_xlabel(names[0])
    place.set_ylabel(names[1])
    for x, y in points.values():
        place.scatter(x, y, s=45, color=_POINT_COLOR, linewidths=0, zorder=3)
    _name_points(figure, place, points, points=list(points.values()))
    figure.savefig(path, dpi=_DOTS_PER_INCH, format="png")


def _figure(height: float = _INCHES[1]) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_INCHES[0], height), layout="constrained")
    place = figure.subplots()
    place.grid(**_GRID)
    place.set_axisbelow(True)
    place.spines[["top", "right"]].set_visible(False)
    place.margins(0.08)
    return figure, place


def _say(place: Any, words: str) -> None:
    place.axis("off")
    place.text(0.5, 0.5, words, ha="center", transform=place.transAxes, fontsize=11)


def _name_points(
    figure: Any,
    place: Any,
    named: Mapping[int, tuple[float, float]],
    *,
    points: Sequence[tuple[float, float]],
) -> None:
    """Write numbers beside points, where they hide no point and no other number."""
    figure.draw_without_rendering()  # lays out: pixels are known from here
    per_pt = figure.dpi / 72
    high = _FONT_SIZE * per_pt
    taken = [(x, y, 6.0, 6.0) for x, y in map(place.transData.transform, points)]
    for number, point in named.items():
        name = str(number)
        x, y = place.transData.transform(point)
        wide = 0.62 * high * len(name)
        boxes = [
            (x + dx * (wide / 2 + far), y + dy * (high / 2 + far), wide, high)
            for far in (6, 12, 20)
            for dx, dy in ((1, 1), (-1, 1), (1, -1), (-1, -1), (1, 0), (-1, 0))
        ]
        free = [box for box in boxes if not any(_overlap(box, one) for one in taken)]
        best = (free or boxes)[0]
        taken.append(best)
        place.annotate(
            name,
            point,
            ((best[0] - x) / per_pt, (best[1] - y) / per_pt),
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=_FONT_SIZE,
            zorder=4,
        )


def _overlap(
    one: tuple[float, float, float, float], other: tuple[float, float, float, float]
) -> bool:
    """Tell whether two boxes, each with middle, width and height, share a point."""
    return (
        abs(one[0] - other[0]) * 2 < one[2] + other[2]
        and abs(one[1] - other[1]) * 2 < one[3] + other[3]
    )
