"""Draw a comparison: the metric by epoch, and against speed and size."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuning.compare.columns import Column
from tuning.compare.rows import Mode, Row, pareto
from tuning.compare.table import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_INCHES = (7.6, 4.0)
_DOTS_PER_INCH = 110
_NUM_COLORED = 10
_MAX_LABEL_CHARS = 32
_MAX_POINTS = 400
# Any colour that nothing else has: in a page it becomes that of the page's text.
_INK = "#010203"
_GRID_ALPHA = 0.2
_ELEMENT_ID = re.compile(r' id="\w+_\d+"')


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Hold what one picture shows of the rows."""

    title: str
    metric: str
    mode: Mode
    rows: Sequence[Row]
    columns: Sequence[Column]
    across: str = ""
    """Column on the horizontal axis; the epochs if empty."""
    more_is_better: bool = True
    """Of what is across."""
    unit: float = 1.0
    """What the horizontal axis counts in."""
    label: str = ""
    """What stands below it."""


def charts_of(
    rows: Sequence[Row], columns: Sequence[Column], *, metric: str, mode: Mode
) -> list[Chart]:
    """Name the charts that there is anything for."""
    common = {"metric": metric, "mode": mode, "rows": rows, "columns": columns}
    charts = [
        Chart(title=f"{metric} by epoch", **common),
        Chart(
            title=f"{metric} against images/s",
            across="images/s",
            label="images/s of training",
            **common,
        ),
        Chart(
            title=f"{metric} against parameters",
            across="params",
            more_is_better=False,
            unit=1e6,
            label="parameters (millions)",
            **common,
        ),
    ]
    return [
        chart
        for chart in charts
        if (points_of(chart) if chart.across else any(r.mean_curve() for r in rows))
    ]


def points_of(chart: Chart) -> dict[int, tuple[float, float]]:
    """Give the place of each row, by its index, that has both coordinates."""
    across, up = _column(chart, chart.across), _column(chart, "final")
    points: dict[int, tuple[float, float]] = {}
    if across is None or up is None:
        return points
    for at, (x, y) in enumerate(zip(across.cells, up.cells, strict=True)):
        if isinstance(x.value, int | float) and isinstance(y.value, int | float):
            place = x.value / chart.unit, float(y.value)
            if all(map(math.isfinite, place)):
                points[at] = place
    return points


def draw(charts: Sequence[Chart], *, path: Path) -> None:
    """Draw charts below each other into a file."""
    from matplotlib.figure import Figure

    width, height = _INCHES
    figure = Figure(figsize=(width, height * len(charts)), layout="constrained")
    places = figure.subplots(len(charts), 1, squeeze=False)[:, 0]
    for axes, chart in zip(places, charts, strict=True):
        _draw(axes, chart, ink="black")
        axes.set_title(printable(chart.title), parse_math=False)
    figure.savefig(path, dpi=_DOTS_PER_INCH)


def as_svg(chart: Chart) -> str:
    """Draw a chart as an SVG element in the colour of the text around it."""
    import matplotlib
    from matplotlib.figure import Figure

    # Texts as texts: they can be searched, and the file stays small.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": chart.title}):
        figure = Figure(figsize=_INCHES, layout="constrained")
        _draw(figure.subplots(), chart, ink=_INK)
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    text = out.getvalue()
    element = text[text.index("<svg") :].replace(_INK, "currentColor")
    # Several of them stand in one page, where an id may come once.
    return _ELEMENT_ID.sub("", element)


def _draw(axes: Axes, chart: Chart, *, ink: str) -> None:
    if chart.across:
        _draw_points(axes, chart, ink=ink)
    else:
        _draw_curves(axes, chart, ink=ink)
    axes.set_ylabel(printable(chart.metric), color=ink, parse_math=False)
    axes.xaxis.label.set_color(ink)
    axes.tick_params(which="both", colors=ink)
    axes.grid(color=ink, alpha=_GRID_ALPHA, linewidth=0.7)
    for side, spine in axes.spines.items():
        spine.set_color(ink)
        spine.set_visible(side in ("left", "bottom"))


def _draw_curves(axes: Axes, chart: Chart, *, ink: str) -> None:
    """Draw a line a row, with a band of one deviation where it has several runs."""
    from matplotlib.ticker import MaxNLocator

    # The first rows last, so that they lie above the others.
    for at, row in reversed(list(enumerate(chart.rows))):
        every = row.mean_curve()
        if not every:
            continue
        points = [*every[:: math.ceil(len(every) / _MAX_POINTS)], every[-1]]
        epochs, means, deviations = (
            list(values) for values in zip(*points, strict=True)
        )
        style = _style(at, ink=ink)
        marker = "." if len(every) < 40 else ""
        axes.plot(
            epochs, means, marker=marker, linewidth=1.5, label=_label(at, row), **style
        )
        if len(row.runs) > 1:
            low = [mean - dev for mean, dev in zip(means, deviations, strict=True)]
            high = [mean + dev for mean, dev in zip(means, deviations, strict=True)]
            axes.fill_between(
                epochs, low, high, color=style["color"], alpha=0.2, linewidth=0
            )
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    handles, labels = axes.get_legend_handles_labels()
    shown = list(zip(handles, labels, strict=True))[::-1][:_NUM_COLORED]
    legend = axes.legend(
        [handle for handle, _ in shown],
        [label for _, label in shown],
        loc="center left",
        bbox_to_anchor=(1, 0.5),
        fontsize=8,
        frameon=False,
        labelcolor=ink,
    )
    for text in legend.get_texts():
        text.set_parse_math(False)  # a name may hold dollars


def _draw_points(axes: Axes, chart: Chart, *, ink: str) -> None:
    """Draw a point a row with its deviations, numbers, and the Pareto front."""
    points = points_of(chart)
    across, up = _column(chart, chart.across), _column(chart, "final")
    assert across is not None
    assert up is not None
    # What was stopped early is no rival of what was trained to its end.
    done = {at for at in points if chart.rows[at].state == "finished"}
    front = pareto(
        {at: place for at, place in points.items() if at in done or not done},
        more_is_better=(chart.more_is_better, chart.mode == "max"),
    )
    axes.plot(
        [points[at][0] for at in front],
        [points[at][1] for at in front],
        color=ink,
        linestyle="--",
        linewidth=1,
        alpha=0.6,
        label="Pareto front, finished runs" if done else "Pareto front",
    )
    for at, (x, y) in points.items():
        style = _style(at, ink=ink)
        axes.errorbar(
            x,
            y,
            xerr=(across.cells[at].deviation or 0) / chart.unit or None,
            yerr=up.cells[at].deviation or None,
            marker="o",
            markersize=7 if at in front else 4,
            **style,
        )
        if at in front or at < _NUM_COLORED:
            axes.annotate(
                str(at + 1),
                (x, y),
                xytext=(6, 4),
                textcoords="offset points",
                color=ink,
                fontsize=9,
                fontweight="bold" if at in front else "normal",
            )
    axes.set_xlabel(chart.label)
    axes.margins(0.1)
    axes.legend(loc="best", fontsize=8, frameon=False, labelcolor=ink)


def _style(at: int, *, ink: str) -> dict[str, Any]:
    """Give the first rows a colour each, and the others none."""
    if at < _NUM_COLORED:
        return {"color": f"C{at}"}
    return {"color": ink, "alpha": 0.25}


def _label(at: int, row: Row) -> str:
    # The number also keeps a leading `_` from hiding the label.
    label = f"{at + 1}  {printable(row.name)}"
    cut = label[: _MAX_LABEL_CHARS - 1] + "…"
    return label if len(label) <= _MAX_LABEL_CHARS else cut


def _column(chart: Chart, name: str) -> Column | None:
    return next((column for column in chart.columns if column.name == name), None)
