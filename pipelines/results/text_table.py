"""Tabulate compared runs with pandas: as text, as CSV and as HTML.

A table is three frames of one shape: values to sort and export, their deviations over
seeds, and texts for people. Names, params and tags are foreign text: HTML escapes them,
a terminal gets no control characters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pandas as pd

from pipelines.results.rows import (
    PUBLISHED,
    ComparedRun,
    Mode,
    Row,
    Spread,
    differences,
)
from pipelines.tracking.sweeps import NUM_PARAMS

TOP1 = "val/top1"
LOSS = "val/loss"
RATE = "images/s"
NOTHING = "-"
_PEAK_MEMORY = "train/peak_memory_mb"
_PROBES = ("probe/loss_variation", "probe/gradient_predictiveness")
_REASON_TAG = "failure_reason"
# These are there even where no run has a value yet.
_ALWAYS = ("name", "n", "epochs", "final", "best")
_MILLION, _HOURS = "M", "h"
_BARS = "▁▂▃▄▅▆▇█"
_NUM_BARS = 12
_MAX_NAME_CHARS = 36
_MAX_VALUE_CHARS = 20
_MAX_PARAMS = 12


class Cell(NamedTuple):
    """One value, its deviation over seeds, and the text of both."""

    value: float | str | None
    text: str
    deviation: float | None = None


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of runs, numbered from 1, and the columns over them."""

    rows: tuple[Row, ...]
    values: pd.DataFrame
    """Numbers or texts; None for an empty cell."""
    deviations: pd.DataFrame
    texts: pd.DataFrame
    params: tuple[str, ...]
    """Columns of configuration values that differ."""

    def is_numeric(self, column: str) -> bool:
        """Check whether a column has values that are all numbers."""
        values = self.values[column].dropna().tolist()
        return bool(values) and not any(isinstance(value, str) for value in values)

    def best(self, column: str, *, mode: Mode) -> int | None:
        """Return the row number of a column's best value; None below two values."""
        numbers = self.values[column].dropna().astype(float)
        if len(numbers) < 2:
            return None
        found = numbers.to_numpy()
        at = found.argmax() if mode == "max" else found.argmin()
        return int(numbers.index.to_numpy()[at])

    def sorted(self, by: str, *, falling: bool) -> Table:
        """Sort rows by a column, with empty cells last.

        Raises ValueError, naming the columns, if there is no such one.
        """
        if by not in self.values:
            names = ", ".join(self.values)
            raise ValueError(f"sort: expected a column, got {by!r}; there are {names}")
        values = self.values[by]
        order: list[Any] = list(values.dropna().index)
        # Numbers first, then texts.
        order.sort(key=lambda n: (isinstance(values[n], str), values[n]))
        order = order[::-1] if falling else order
        order += [number for number in values.index if number not in order]

        def moved(frame: pd.DataFrame) -> pd.DataFrame:
            return frame.loc[order].set_axis(self.values.index)

        return Table(
            rows=tuple(self.rows[number - 1] for number in order),
            values=moved(self.values),
            deviations=moved(self.deviations),
            texts=moved(self.texts),
            params=self.params,
        )

    def to_text(self, *, width: int) -> str:
        """Format aligned columns within a width, with each row's curve.

        Columns that do not fit continue below, with the rows' numbers again.
        """
        left_out = list(self.params[_MAX_PARAMS:])
        shown = self.texts.drop(columns=left_out)
        for name in ("name", *self.params[:_MAX_PARAMS]):
            limit = _MAX_NAME_CHARS if name == "name" else _MAX_VALUE_CHARS
            shown[name] = [_shortened(text, limit=limit) for text in shown[name]]
        after_best = list(shown).index("best") + 1
        shown.insert(after_best, "curve", curve_bars(self.rows))
        shown = shown.map(printable).rename(columns=printable)
        # Beginning in one column is how names and states are read.
        for name in ("name", "state", "curve"):
            if name in shown:
                shown[name] = shown[name].str.ljust(shown[name].str.len().max())
        text = shown.rename_axis(columns="#").to_string(line_width=width)
        if left_out:
            names = ", ".join(map(printable, left_out))
            text += f"\n\nalso different, see --html or --csv: {names}"
        return text

    def to_csv(self) -> str:
        """Format as CSV: unrounded means and deviations, and each row's run ids."""
        frame = self.values.copy()
        for name in self.deviations.dropna(axis="columns", how="all"):
            at = list(frame).index(name) + 1
            frame.insert(at, f"{name} deviation", self.deviations[name])
        frame["run_ids"] = [" ".join(row.run_ids) for row in self.rows]
        # A NaN came from a run, unlike an empty field.
        frame = frame.map(lambda value: "nan" if value != value else value)
        return frame.to_csv(index=False, lineterminator="\n")

    def to_html(self, *, best: dict[str, Mode]) -> str:
        """Build a table element with the best rows of some columns marked."""
        texts = self.texts.copy()
        reasons = [_reasons(row) for row in self.rows]
        if any(reasons):
            texts.insert(list(texts).index("epochs"), "reason", reasons)
        texts["run ids"] = [" ".join(row.run_ids) for row in self.rows]
        classes = pd.DataFrame("", index=texts.index, columns=texts.columns)
        for name in self.values:
            classes[name] = "number" if self.is_numeric(name) else ""
        for name, mode in best.items():
            if name in self.values and (number := self.best(name, mode=mode)):
                classes.loc[number, name] += " best"
        style = texts.rename_axis(columns="#").style.set_td_classes(classes)
        style.format(escape="html").format_index(escape="html", axis="columns")
        return style.to_html()


def tabulate(
    rows: Sequence[Row], *, metric: str, mode: Mode, each: bool = False
) -> Table:
    """Build the table of rows that are compared by a metric.

    Empty columns are left out, except the first few.
    """
    all_finished = all(row.state == "finished" for row in rows)
    columns: dict[str, list[Cell]] = {
        "name": [Cell(row.name, row.name) for row in rows],
        "n": [Cell(len(row.runs), str(len(row.runs))) for row in rows],
        "state": [Cell(None if all_finished else r.state, r.state) for r in rows],
        "epochs": [_epochs(row) for row in rows],
    }
    for name, value, form, has_deviation in _numbers(metric, mode=mode):
        columns[name] = [
            _cell(row.spread(value), form, has_deviation=has_deviation) for row in rows
        ]
    columns["best"] = [
        _with_epochs(cell, row, mode=mode)
        for cell, row in zip(columns["best"], rows, strict=True)
    ]
    taken = set(columns)
    columns = {
        name: cells
        for name, cells in columns.items()
        if name in _ALWAYS or any(cell.value is not None for cell in cells)
    }
    params = {
        name if short in taken else short: [_param(row.param(name)) for row in rows]
        for name, short in differences(rows, each=each).items()
    }
    columns |= params

    def frame(part: Callable[[Cell], object]) -> pd.DataFrame:
        made = {name: list(map(part, cells)) for name, cells in columns.items()}
        return pd.DataFrame(made, index=range(1, len(rows) + 1), dtype=object)

    return Table(
        rows=tuple(rows),
        values=frame(lambda cell: cell.value),
        deviations=frame(lambda cell: cell.deviation),
        texts=frame(lambda cell: cell.text),
        params=tuple(params),
    )


def _numbers(
    metric: str, *, mode: Mode
) -> list[tuple[str, Callable[[ComparedRun], float | None], str, bool]]:
    """List the numeric columns: name, value, format, whether to show the deviation."""

    def best(run: ComparedRun) -> float | None:
        return point.value if (point := run.best(mode)) else None

    def last(metric: str) -> Callable[[ComparedRun], float | None]:
        return lambda run: run.run.metrics.get(metric)

    form = ".2f" if "top" in metric else ".4g"
    columns = [("final", ComparedRun.final, form, True), ("best", best, form, True)]
    if metric == TOP1:
        columns += [
            ("published", lambda run: run.param(PUBLISHED), ".2f", False),
            ("diff", ComparedRun.above_published, "+.2f", False),
        ]
    if metric != LOSS:
        columns.append(("loss", ComparedRun.loss, ".4f", True))
    return [
        *columns,
        (RATE, ComparedRun.images_per_s, ",.0f", True),
        ("hours", ComparedRun.hours, _HOURS, False),
        ("device h", ComparedRun.device_hours, _HOURS, False),
        ("params", lambda run: run.param(NUM_PARAMS), _MILLION, False),
        ("peak MB", last(_PEAK_MEMORY), ",.0f", False),
        *((name.partition("/")[2], last(name), ".3g", True) for name in _PROBES),
    ]


def number_text(value: float, form: str) -> str:
    """Format a number: `M` in millions, `h` in hours, else as Python does."""
    if not math.isfinite(value):
        return str(value)
    if form == _MILLION:
        return f"{value / 1e6:.2f} M"
    if form == _HOURS:
        form = ".3f" if value < 1 else ".2f" if value < 100 else ",.0f"
    return f"{value:{form}}"


def curve_bars(rows: Sequence[Row]) -> list[str]:
    """Draw each row's mean curve in at most twelve characters, all on one scale."""
    curves = [
        [point.mean for point in row.mean_curve() if math.isfinite(point.mean)]
        for row in rows
    ]
    values = [value for curve in curves for value in curve]
    low, high = min(values, default=0.0), max(values, default=0.0)

    def draw(curve: Sequence[float]) -> str:
        num = min(len(curve), _NUM_BARS)
        # The last of each of equal parts, so that the end is the end.
        points = [curve[(at + 1) * len(curve) // num - 1] for at in range(num)]
        levels = [(point - low) / ((high - low) or 1) for point in points]
        return "".join(_BARS[round(level * (len(_BARS) - 1))] for level in levels)

    return [draw(curve) if curve else NOTHING for curve in curves]


def printable(text: str) -> str:
    """Replace non-printable characters by `?`."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def _cell(found: Spread | None, form: str, *, has_deviation: bool) -> Cell:
    if found is None:
        return Cell(None, NOTHING)
    text = number_text(found.mean, form)
    if not has_deviation or found.deviation is None:
        return Cell(found.mean, text)
    text += f" ± {number_text(found.deviation, form)}"
    return Cell(found.mean, text, found.deviation)


def _epochs(row: Row) -> Cell:
    done = [run.num_epochs for run in row.runs]
    planned = max(run.num_epochs_planned for run in row.runs)
    return Cell(max(done), _range(done) + (f"/{planned}" if planned else ""))


def _with_epochs(cell: Cell, row: Row, *, mode: Mode) -> Cell:
    """Add the epochs of the best values."""
    found = [(run, point) for run in row.runs if (point := run.best(mode))]
    epochs = [run.epoch_at(point.step) for run, point in found]
    known = [epoch for epoch in epochs if epoch is not None]
    return cell._replace(text=f"{cell.text} @ {_range(known)}") if known else cell


def _param(text: str | None) -> Cell:
    if text is None:
        return Cell(None, NOTHING)
    try:
        value = float(text)
    except ValueError:
        return Cell(text, text)
    # What a sweep has drawn has seventeen digits.
    return Cell(value, min(f"{value:.4g}", text, key=len))


def _reasons(row: Row) -> str:
    reasons = dict.fromkeys(run.run.tags.get(_REASON_TAG, "") for run in row.runs)
    return "; ".join(filter(None, reasons))


def _range(values: Sequence[float]) -> str:
    low, high = f"{min(values):.4g}", f"{max(values):.4g}"
    return low if low == high else f"{low}-{high}"


def _shortened(text: str, *, limit: int) -> str:
    # Names and paths differ at their beginnings and ends.
    num_last = limit // 2
    is_short = len(text) <= limit
    return text if is_short else f"{text[: limit - num_last - 1]}…{text[-num_last:]}"
