"""Draw a sweep's settings as lines over parallel axes, one a field, then the metric."""

from __future__ import annotations

import ast
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.runfile import tuples
from tuning.entries import Entry, Sweep
from tuning.report.statistics import is_log
from tuning.report.table import compared, short_names, spelled, value_of

_DOTS_PER_INCH = 110
_HEIGHT_INCHES = 5.2
_MIN_WIDTH_INCHES = 9.2
_INCHES_PER_AXIS = 1.3
_CHOICE = "choice("
_COLORS = "viridis"
_WINNER_COLOR = "crimson"
# Lines through one choice lie so far apart, all together, of the way to the next.
_SPREAD = 0.3
_PAD = 0.06


@dataclass(frozen=True, kw_only=True)
class _Axis:
    """Hold an axis: where its trials cross it, from 0 to 1, and what is written."""

    places: list[float]
    ticks: list[tuple[float, str]]


def draw_parallel(sweep: Sweep, entries: Sequence[Entry], path: Path) -> None:
    """Draw each trial that has a value as a line, the better the brighter, into a PNG.

    The metric's axis has its better end above. Stopped trials are thin and pale, the
    winner is thick and named.
    """
    from matplotlib.figure import Figure

    found = compared(sweep.search, entries)
    names = [*short_names(sweep.domains).values(), sweep.search.metric]
    width = max(_MIN_WIDTH_INCHES, _INCHES_PER_AXIS * len(names))
    figure = Figure(figsize=(width, _HEIGHT_INCHES), layout="constrained")
    place = figure.subplots()
    place.set_title(_title(sweep, found, num_all=len(entries)), fontsize=11)
    place.set_xlim(-0.15, len(names) - 1 + 0.9)
    place.set_ylim(-0.16, 1.04)
    place.axis("off")
    axes = _axes(sweep, found) if found else []
    for at, axis in enumerate(axes):
        _draw_axis(place, axis, x=at, is_last=at == len(axes) - 1)
    for at, name in enumerate(names):
        # Neighbours stand on two levels where there are many: names are long.
        low = len(names) > 5 and at % 2
        place.text(at, -0.13 if low else -0.07, name, ha="center", fontsize=9.5)
    # The best are drawn last, above the others.
    for at in reversed(range(len(found))):
        line = [axis.places[at] for axis in axes]
        _draw_line(place, found[at], line, is_winner=at == 0)
    if found:
        value = value_of(found[0], sweep.search.metric)
        place.text(
            len(names) - 1 + 0.4,
            axes[-1].places[0],
            f"trial {found[0].number}\n{spelled(value)}",
            color=_WINNER_COLOR,
            va="center",
            fontsize=9.5,
            fontweight="bold",
        )
    figure.savefig(path, dpi=_DOTS_PER_INCH, format="png")


def _title(sweep: Sweep, found: Sequence[Entry], *, num_all: int) -> str:
    words = [f"{sweep.name}: {len(found)} trials"]
    if num_all > len(found):
        words.append(f"{num_all - len(found)} failed or without a value left out")
    if any(entry.status != "finished" for entry in found):
        words.append("thin: did not finish")
    return ", ".join(words)


def _draw_axis(place: Any, axis: _Axis, *, x: int, is_last: bool) -> None:
    """Draw an axis; the ticks of the last stand on its free side."""
    place.plot([x, x], [0, 1], color="0.25", linewidth=1, zorder=5)
    for y, text in axis.ticks:
        place.plot([x - 0.012, x + 0.012], [y, y], color="0.25", linewidth=1, zorder=5)
        place.text(
            x + 0.03 if is_last else x - 0.03,
            y,
            text,
            ha="left" if is_last else "right",
            va="center",
            fontsize=8.5,
            zorder=6,
            bbox={"facecolor": "white", "alpha": 0.85, "linewidth": 0, "pad": 0.8},
        )


def _draw_line(
    place: Any, entry: Entry, line: Sequence[float], *, is_winner: bool
) -> None:
    from matplotlib import colormaps

    # From dark blue to green: the yellow end can't be seen on white.
    color = colormaps[_COLORS](0.8 * line[-1])
    style: dict[str, Any] = {"color": color, "linewidth": 1.7, "zorder": 3}
    if entry.status != "finished":
        style |= {"linewidth": 0.9, "alpha": 0.4, "zorder": 2}
    if is_winner:
        style |= {"color": _WINNER_COLOR, "linewidth": 3.2, "alpha": 1, "zorder": 4}
    place.plot(range(len(line)), line, **style)


def _axes(sweep: Sweep, found: Sequence[Entry]) -> list[_Axis]:
    axes = []
    for name, domain in sweep.domains.items():
        values = [entry.setting.get(name) for entry in found]
        are_numbers = all(type(value) in (int, float) for value in values)
        if are_numbers and not domain.startswith(_CHOICE):
            axes.append(_number_axis(values, takes_log=is_log(domain)))
        else:
            axes.append(_choice_axis(values, choices=_choices(domain)))
    metric = [value_of(entry, sweep.search.metric) for entry in found]
    axes.append(_number_axis(metric, flips=sweep.search.sign < 0))
    return axes


def _choices(domain: str) -> list[Any]:
    """Read the choices that a domain names, as far as they are plain values."""
    try:
        words = domain.removeprefix(_CHOICE).removesuffix(")")
        return list(tuples(ast.literal_eval(words)))
    except (ValueError, SyntaxError, TypeError):
        return []


def _choice_axis(values: Sequence[Any], *, choices: Sequence[Any]) -> _Axis:
    """Set choices at equal distances, rising where they can be sorted."""
    steps = list(dict.fromkeys([*choices, *values]))
    try:
        steps.sort()
    except TypeError:  # None among numbers, say: as the space has them
        steps = list(dict.fromkeys([*choices, *values]))
    gap = 1 / len(steps)
    shifts = _shifts(len(values), width=_SPREAD * gap)
    middle = {step: (at + 0.5) * gap for at, step in enumerate(steps)}
    return _Axis(
        # The best cross above: the first.
        places=[middle[v] + s for v, s in zip(values, shifts, strict=True)],
        ticks=[(y, spelled(step)) for step, y in middle.items()],
    )


def _shifts(num: int, *, width: float) -> list[float]:
    return [width * (0.5 - at / (num - 1)) if num > 1 else 0.0 for at in range(num)]


def _number_axis(
    values: Sequence[Any], *, takes_log: bool = False, flips: bool = False
) -> _Axis:
    """Set numbers by their size, or by its logarithm, within the range that came."""
    from matplotlib.ticker import LogLocator, MaxNLocator

    takes_log = takes_log and min(values) > 0

    def scaled(value: float) -> float:
        return math.log(value) if takes_log else float(value)

    low, high = scaled(min(values)), scaled(max(values))
    width = (high - low) or 1.0
    middle = (high + low) / 2

    def place(value: float) -> float:
        y = 0.5 + (scaled(value) - middle) / width * (1 - 2 * _PAD)
        return 1 - y if flips else y

    locator = LogLocator(subs=(1, 2, 5)) if takes_log else MaxNLocator(6)
    ticks = locator.tick_values(min(values), max(values)) if high > low else values[:1]
    return _Axis(
        places=[place(value) for value in values],
        ticks=[
            (place(tick), f"{tick:.6g}" if high > low else spelled(tick))
            for tick in ticks
            if (tick > 0 or not takes_log) and 0 <= place(tick) <= 1
        ],
    )
