"""Plot a sweep's results: settings, trade-offs, importances, rank correlation."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tuning.report.statistics import (
    MIN_PAIRS,
    importances,
    quiet_optuna,
    rank_correlation,
    study_of,
)
from tuning.report.table import compared, front, short_names, value_of
from tuning.trials.ledger import Sweep, TrialRecord
from tuning.trials.options import Mode

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_DOTS_PER_INCH = 110
_INCHES = (9.2, 5.2)
_INCHES_PER_AXIS = 1.3
_RATES = ("train/images_per_s", "head/images_per_s")
_FRONT_COLOR, _POINT_COLOR, _STOPPED_COLOR = "crimson", "tab:blue", "lightsteelblue"


def draw_parallel(sweep: Sweep, entries: Sequence[TrialRecord], path: Path) -> None:
    """Plot each trial that has a value as a line over its fields, into a PNG."""
    import matplotlib
    from matplotlib.figure import Figure
    from optuna.visualization.matplotlib import plot_parallel_coordinate

    found = compared(sweep.search, entries)
    values = [value_of(entry, sweep.search.metric) for entry in found]
    # Optuna draws with pyplot, whose settings are the whole process's.
    with matplotlib.rc_context(), quiet_optuna():
        study = study_of(
            sweep, found, values=[value for value in values if value is not None]
        )
        axes = plot_parallel_coordinate(study, target_name=sweep.search.metric)
        axes.set_title(_title(sweep, found, num_all=len(entries)))
        figure = axes.figure
        assert isinstance(figure, Figure)
        width = max(_INCHES[0], _INCHES_PER_AXIS * (1 + len(sweep.domains)))
        figure.set_size_inches(width, _INCHES[1])
        figure.savefig(path, dpi=_DOTS_PER_INCH, bbox_inches="tight", format="png")
        from matplotlib import pyplot

        pyplot.close(figure)


def _title(sweep: Sweep, found: Sequence[TrialRecord], *, num_all: int) -> str:
    title = f"{sweep.name}: {len(found)} trials"
    if found:
        title += f", best {found[0].number}"
    if num_all > len(found):
        title += f", {num_all - len(found)} failed or without a value left out"
    return title


def draw_pareto(sweep: Sweep, entries: Sequence[TrialRecord], path: Path) -> None:
    """Plot the first metric over the second as a PNG, with the Pareto front.

    With a single metric, images per second take the second's place. Trials that did
    not finish are pale: they stand where they were stopped.
    """
    x_metric, x_mode = _second(sweep, entries)
    y_metric, y_mode = sweep.search.metric, sweep.search.modes[0]
    found = compared(sweep.search, entries)
    points = {
        entry.number: (x, y)
        for entry in found
        if (x := value_of(entry, x_metric)) is not None
        and (y := value_of(entry, y_metric)) is not None
    }
    best = [
        entry.number
        for entry in front(found, metrics=(y_metric, x_metric), modes=(y_mode, x_mode))
    ]
    stopped = [e.number for e in found if e.status != "finished" and e.number in points]
    axes = _axes(
        f"{sweep.name}: {len(points)} trials, {len(best)} on the front",
        x=f"{x_metric} ({_better(x_mode)})",
        y=f"{y_metric} ({_better(y_mode)})",
    )
    _scatter(axes, points, points, color=_POINT_COLOR, label="others")
    _scatter(axes, points, stopped, color=_STOPPED_COLOR, label="did not finish")
    _scatter(axes, points, best, color=_FRONT_COLOR, label="no other is better in both")
    edge = sorted(points[number] for number in best)
    axes.plot([x for x, _ in edge], [y for _, y in edge], color=_FRONT_COLOR)
    _name(axes, {number: points[number] for number in best})
    axes.legend(frameon=False)
    _save(axes, path)


def _second(sweep: Sweep, entries: Sequence[TrialRecord]) -> tuple[str, Mode]:
    """Return the metric of the x axis."""
    search = sweep.search
    if len(search.metrics) > 1:
        return search.metrics[1], search.modes[1]
    for rate in _RATES:
        if any(value_of(entry, rate) is not None for entry in entries):
            return rate, "max"
    return _RATES[0], "max"


def _better(mode: Mode) -> str:
    return "more is better" if mode == "max" else "less is better"


def draw_importances(
    sweep: Sweep,
    entries: Sequence[TrialRecord],
    path: Path,
    *,
    found: tuple[int, Mapping[str, float]] | None = None,
) -> None:
    """Plot the importance of each field as bars in a PNG.

    Args:
        found: What `importances` gave, which takes seconds; worked out if None.
    """
    epoch, shares = importances(sweep, entries) if found is None else found
    names = short_names(sweep.domains)
    num = len(compared(sweep.search, entries))
    axes = _axes(
        f"{sweep.name}: what {sweep.search.metric} in epoch {epoch} depends on "
        f"({num} trials{'' if shares else ', too few or all of one value'})",
        x="share of its variance that the field explains (%), by fANOVA",
    )
    fields = [names[field] for field in shares]
    bars = axes.barh(fields, [100 * share for share in shares.values()])
    axes.bar_label(bars, fmt="%.0f %%", padding=4)
    axes.invert_yaxis()
    axes.set_xlim(0, 112)
    _save(axes, path)


def draw_ranks(
    cheap: Sequence[float],
    full: Sequence[float],
    path: Path,
    *,
    numbers: Sequence[int],
    names: tuple[str, str] = ("head/top1", "val/top1"),
) -> None:
    """Plot values of full training over those of cheap training as a PNG.

    Args:
        numbers: The trials', beside their points.
        names: Of the two values.
    """
    points = {
        number: (x, y)
        for x, y, number in zip(cheap, full, numbers, strict=True)
        if math.isfinite(x) and math.isfinite(y)
    }
    spearman, kendall = rank_correlation(cheap, full)
    said = f"Spearman {spearman:.2f}, Kendall {kendall:.2f}"
    if math.isnan(spearman):
        few = f"ranks of fewer than {MIN_PAIRS} say nothing"
        said = few if len(points) < MIN_PAIRS else "all of one value: no ranks"
    axes = _axes(f"{len(points)} trials: {said}", x=names[0], y=names[1])
    _scatter(axes, points, points, color=_POINT_COLOR)
    _name(axes, points)
    _save(axes, path)


def _axes(title: str, *, x: str, y: str = "") -> Axes:
    from matplotlib.figure import Figure

    axes = Figure(figsize=_INCHES, layout="constrained").subplots()
    axes.set_title(title, fontsize=11)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    axes.margins(0.08)
    return axes


def _scatter(
    axes: Axes,
    points: Mapping[int, tuple[float, float]],
    numbers: Iterable[int],
    *,
    color: str,
    label: str = "",
) -> None:
    shown = [points[number] for number in numbers]
    if shown:
        axes.scatter(*zip(*shown, strict=True), s=45, color=color, label=label)


def _name(axes: Axes, points: Mapping[int, tuple[float, float]]) -> None:
    """Annotate points with their trials' numbers."""
    for number, point in points.items():
        axes.annotate(str(number), point, (6, 4), textcoords="offset points")


def _save(axes: Axes, path: Path) -> None:
    axes.get_figure().savefig(path, dpi=_DOTS_PER_INCH, format="png")  # type: ignore
