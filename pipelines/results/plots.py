"""Plot a comparison: the metric by epoch, and against speed and size."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.results.rows import Mode, Row, pareto
from pipelines.results.text_table import RATE, Table, printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_INCHES = (7.6, 4.0)
_DOTS_PER_INCH = 110
_NUM_COLORED = 10
_MAX_LABEL_CHARS = 32
_MAX_POINTS = 400
# Any colour that nothing else has: in a page it becomes that of the page's text.
_INK = "#010203"
_ELEMENT_ID = re.compile(r' id="\w+_\d+"')
# Column across, what stands below it, what it is counted in, whether more is better.
_AGAINST = (
    (RATE, "images/s of training", 1.0, True),
    ("params", "parameters (millions)", 1e6, False),
)


@dataclass(frozen=True, kw_only=True)
class Chart:
    """One plot of the rows: by epoch, or against a column."""

    title: str
    metric: str
    mode: Mode
    table: Table
    across: str = ""
    """Column on the horizontal axis; the epochs if empty."""
    label: str = "epoch"
    unit: float = 1.0
    more_is_better: bool = True

    @property
    def points(self) -> dict[int, tuple[float, float]]:
        """Coordinates of each row that has both, by its number."""
        values = self.table.values
        if self.across not in values:
            return {}
        pairs = values[[self.across, "final"]].astype(float)
        return {
            number: (x / self.unit, y)
            for number, (x, y) in enumerate(pairs.to_numpy().tolist(), start=1)
            if math.isfinite(x) and math.isfinite(y)
        }


def charts_of(table: Table, *, metric: str, mode: Mode) -> list[Chart]:
    """List the charts that have data."""
    charts: list[Chart] = []
    if any(row.mean_curve() for row in table.rows):
        title = f"{metric} by epoch"
        charts.append(Chart(title=title, metric=metric, mode=mode, table=table))
    for across, label, unit, more_is_better in _AGAINST:
        chart = Chart(
            title=f"{metric} against {label.split(' (')[0]}",
            metric=metric,
            mode=mode,
            table=table,
            across=across,
            label=label,
            unit=unit,
            more_is_better=more_is_better,
        )
        charts += [chart] if chart.points else []
    return charts


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
        _draw_curves(axes, chart.table.rows, ink=ink)
    axes.set_ylabel(printable(chart.metric), color=ink, parse_math=False)
    axes.set_xlabel(chart.label, color=ink)
    axes.tick_params(which="both", colors=ink)
    axes.grid(color=ink, alpha=0.2, linewidth=0.7)
    for side, spine in axes.spines.items():
        spine.set_color(ink)
        spine.set_visible(side in ("left", "bottom"))


def _draw_curves(axes: Axes, rows: Sequence[Row], *, ink: str) -> None:
    """Draw a line per row, with a band of one deviation if it has several runs."""
    from matplotlib.ticker import MaxNLocator

    handles = []
    for number, row in enumerate(rows, start=1):
        if not (every := row.mean_curve()):
            continue
        points = [*every[:: math.ceil(len(every) / _MAX_POINTS)], every[-1]]
        epochs = [point.epoch for point in points]
        style = _style(number, ink=ink)
        # The first rows lie above the others.
        order = 2 + 1 / number
        (line,) = axes.plot(
            epochs,
            [point.mean for point in points],
            marker="." if len(every) < 40 else "",
            label=_label(number, row),
            zorder=order,
            **style,
        )
        handles.append(line)
        if len(row.runs) > 1:
            low = [point.mean - point.deviation for point in points]
            high = [point.mean + point.deviation for point in points]
            band: dict[str, Any] = {"color": style["color"], "alpha": 0.2}
            axes.fill_between(epochs, low, high, linewidth=0, zorder=order, **band)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    legend = axes.legend(
        handles=handles[:_NUM_COLORED],
        loc="center left",
        bbox_to_anchor=(1, 0.5),
        fontsize=8,
        frameon=False,
        labelcolor=ink,
    )
    for text in legend.get_texts():
        text.set_parse_math(False)  # a name may hold dollars


def _draw_points(axes: Axes, chart: Chart, *, ink: str) -> None:
    """Draw a point per row with its deviations and number, and the Pareto front."""
    points, table = chart.points, chart.table
    # What was stopped early is no rival of what was trained to its end.
    done = {number for number in points if table.rows[number - 1].state == "finished"}
    front = pareto(
        {number: points[number] for number in done or points},
        more_is_better=(chart.more_is_better, chart.mode == "max"),
    )
    axes.plot(
        *zip(*(points[number] for number in front), strict=True),
        color=ink,
        linestyle="--",
        linewidth=1,
        alpha=0.6,
        label="Pareto front, finished runs" if done else "Pareto front",
    )
    deviations = table.deviations[[chart.across, "final"]].astype(float).fillna(0)
    for number, (x, y) in points.items():
        x_error, y_error = deviations.loc[number]
        axes.errorbar(
            x,
            y,
            xerr=x_error / chart.unit or None,
            yerr=y_error or None,
            marker="o",
            markersize=7 if number in front else 4,
            **_style(number, ink=ink),
        )
        if number in front or number <= _NUM_COLORED:
            axes.annotate(
                str(number),
                (x, y),
                xytext=(6, 4),
                textcoords="offset points",
                color=ink,
                fontsize=9,
                fontweight="bold" if number in front else "normal",
            )
    axes.margins(0.1)
    axes.legend(loc="best", fontsize=8, frameon=False, labelcolor=ink)


def _style(number: int, *, ink: str) -> dict[str, Any]:
    """Return a row's style: its own colour for the first rows, faint for others."""
    if number <= _NUM_COLORED:
        return {"color": f"C{number - 1}"}
    return {"color": ink, "alpha": 0.25}


def _label(number: int, row: Row) -> str:
    # The number also keeps a leading `_` from hiding the label.
    label = f"{number}  {printable(row.name)}"
    cut = label[: _MAX_LABEL_CHARS - 1] + "…"
    return label if len(label) <= _MAX_LABEL_CHARS else cut
