"""Make the columns of a comparison: what was reached, what it cost, what differs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pipelines.tracking.sweeps import NUM_PARAMS
from tuning.compare.rows import (
    PUBLISHED,
    Measured,
    Mode,
    Row,
    Spread,
    differences,
)

TOP1 = "val/top1"
LOSS = "val/loss"
NOTHING = "-"
_PEAK_MEMORY = "train/peak_memory_mb"
_PROBES = ("probe/loss_variation", "probe/gradient_predictiveness")
_REASON_TAG = "failure_reason"
_ALWAYS = ("name", "n", "epochs", "final", "best")
_MILLION, _HOURS = "M", "h"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """Hold what one column says of a row."""

    text: str
    value: float | str | None = None
    """What it sorts by, and CSV's value."""
    deviation: float | None = None
    note: str = ""
    """What a page shows when it is pointed at."""

    @property
    def sort_key(self) -> tuple[float, str]:
        """Sort numbers first, then texts."""
        if isinstance(self.value, int | float):
            return float(self.value), ""
        return math.inf, self.value or ""

    @property
    def is_missing(self) -> bool:
        """Tell whether there is nothing to sort by: a NaN is nothing."""
        return self.value is None or self.value != self.value


@dataclass(frozen=True, kw_only=True)
class Column:
    """Hold one column of a comparison, a cell a row."""

    name: str
    """Its heading, and what CSV and --sort call it."""
    cells: tuple[Cell, ...]
    note: str = ""
    is_param: bool = False

    @property
    def is_numeric(self) -> bool:
        """Tell whether every value there is is a number."""
        values = [cell.value for cell in self.cells if cell.value is not None]
        return bool(values) and not any(isinstance(value, str) for value in values)


def columns_of(
    rows: Sequence[Row], *, metric: str, mode: Mode, each: bool = False
) -> tuple[Column, ...]:
    """Make the columns of rows that are compared by a metric.

    A column that no row has anything for is left out, but for the first few.
    """
    form = ".2f" if "top" in metric else ".4g"
    made = [
        _names(rows),
        _column(rows, "n", lambda row: _plain(len(row.runs)), note="runs"),
        _states(rows),
        _column(rows, "epochs", _epochs, note="epochs done, of those wanted"),
        _measured(rows, "final", Measured.final, form, note=f"last {metric}"),
        _column(
            rows,
            "best",
            lambda row: _best(row, mode=mode, form=form),
            note=f"best {metric}, and its epoch",
        ),
    ]
    if metric == TOP1:
        made += [
            _same(rows, "published", _published, ".2f", note="what the paper reports"),
            _mean(rows, "diff", _difference, "+.2f", note="final - published"),
        ]
    if metric != LOSS:
        made.append(_measured(rows, "loss", _loss, ".4f", note=f"last {LOSS}"))
    made += [
        _measured(rows, "images/s", Measured.images_per_s, ",.0f", note="of training"),
        _mean(rows, "hours", Measured.hours, _HOURS, note="from start to end"),
        _mean(rows, "device h", Measured.device_hours, _HOURS, note="hours x workers"),
        _same(rows, "params", _num_params, _MILLION, note="parameters of the model"),
        _mean(rows, "peak MB", _last(_PEAK_MEMORY), ",.0f", note=_PEAK_MEMORY),
        *(
            _measured(rows, probe.partition("/")[2], _last(probe), ".3g", note=probe)
            for probe in _PROBES
        ),
    ]
    kept = [
        column
        for column in made
        if column.name in _ALWAYS
        or any(cell.value is not None for cell in column.cells)
    ]
    taken = {column.name for column in made}
    return (*kept, *_param_columns(rows, taken=taken, each=each))


def sort_rows(
    rows: Sequence[Row], columns: Sequence[Column], *, by: str, falling: bool
) -> list[Row]:
    """Sort rows by a column; rows that have nothing there come last.

    Raises ValueError that names the columns where there is no such one.
    """
    found = next((column for column in columns if column.name == by), None)
    if found is None:
        names = ", ".join(column.name for column in columns)
        raise ValueError(f"sort: wanted a column, came {by!r}; there are {names}")
    pairs = list(zip(rows, found.cells, strict=True))
    there = [pair for pair in pairs if not pair[1].is_missing]
    there.sort(key=lambda pair: pair[1].sort_key, reverse=falling)
    missing = [pair for pair in pairs if pair[1].is_missing]
    return [row for row, _ in there + missing]


def number_text(value: float, form: str) -> str:
    """Write a number: `M` as millions, `h` as hours, else as Python does."""
    if not math.isfinite(value):
        return str(value)
    if form == _MILLION:
        return f"{value / 1e6:.2f} M"
    if form == _HOURS:
        form = ".3f" if value < 1 else ".2f" if value < 100 else ",.0f"
    return f"{value:{form}}"


def _cell(found: Spread | None, form: str, *, with_deviation: bool = True) -> Cell:
    if found is None:
        return Cell(text=NOTHING)
    text = number_text(found.mean, form)
    if with_deviation and found.deviation is not None:
        text += f" ± {number_text(found.deviation, form)}"
    return Cell(text=text, value=found.mean, deviation=found.deviation)


def _plain(value: float) -> Cell:
    return Cell(text=f"{value:g}", value=value)


def _column(
    rows: Sequence[Row], name: str, cell: Callable[[Row], Cell], *, note: str
) -> Column:
    return Column(name=name, cells=tuple(map(cell, rows)), note=note)


def _measured(
    rows: Sequence[Row],
    name: str,
    value: Callable[[Measured], float | None],
    form: str,
    *,
    note: str,
) -> Column:
    return _column(rows, name, lambda row: _cell(row.spread(value), form), note=note)


def _mean(
    rows: Sequence[Row],
    name: str,
    value: Callable[[Measured], float | None],
    form: str,
    *,
    note: str,
) -> Column:
    """Show means alone, where the deviation says little or stands elsewhere."""

    def cell(row: Row) -> Cell:
        return _cell(row.spread(value), form, with_deviation=False)

    return _column(rows, name, cell, note=note)


def _same(
    rows: Sequence[Row],
    name: str,
    value: Callable[[Measured], float | None],
    form: str,
    *,
    note: str,
) -> Column:
    """Make a column of what is one number for all runs of a row."""

    def cell(row: Row) -> Cell:
        return _cell(Spread.of(set(map(value, row.runs))), form)

    return _column(rows, name, cell, note=note)


def _names(rows: Sequence[Row]) -> Column:
    def cell(row: Row) -> Cell:
        names = [f"{run.run.name} ({run.run.run_id})" for run in row.runs]
        return Cell(text=row.name, value=row.name, note="\n".join(names))

    return _column(rows, "name", cell, note="first run, and how many more")


def _states(rows: Sequence[Row]) -> Column:
    """Say how runs ended, unless all of them finished."""
    all_done = all(row.state == "finished" for row in rows)

    def cell(row: Row) -> Cell:
        reasons = dict.fromkeys(run.run.tags.get(_REASON_TAG, "") for run in row.runs)
        note = "\n".join(filter(None, reasons))
        return Cell(text=row.state, value=None if all_done else row.state, note=note)

    return _column(rows, "state", cell, note="how the runs ended")


def _epochs(row: Row) -> Cell:
    done = [run.num_epochs for run in row.runs]
    wanted = max(run.wanted_epochs for run in row.runs)
    text = _range(done) + (f"/{wanted}" if wanted else "")
    return Cell(text=text, value=max(done))


def _best(row: Row, *, mode: Mode, form: str) -> Cell:
    found = [(run, point) for run in row.runs if (point := run.best(mode))]
    cell = _cell(Spread.of(point.value for _, point in found), form)
    epochs = [run.epoch_at(point.step) for run, point in found]
    known = [epoch for epoch in epochs if epoch is not None]
    text = f"{cell.text} @ {_range(known)}" if known else cell.text
    return Cell(text=text, value=cell.value, deviation=cell.deviation)


def _loss(run: Measured) -> float | None:
    return run.losses[-1].value if run.losses else None


def _published(run: Measured) -> float | None:
    return run.param(PUBLISHED)


def _difference(run: Measured) -> float | None:
    final, published = run.final(), _published(run)
    return None if final is None or published is None else final - published


def _num_params(run: Measured) -> float | None:
    return run.param(NUM_PARAMS)


def _last(metric: str) -> Callable[[Measured], float | None]:
    return lambda run: run.run.metrics.get(metric)


def _param_columns(rows: Sequence[Row], *, taken: set[str], each: bool) -> list[Column]:
    return [
        Column(
            name=name if short in taken else short,
            cells=tuple(_param_cell(row.param(name)) for row in rows),
            note=name,
            is_param=True,
        )
        for name, short in differences(rows, each=each).items()
    ]


def _param_cell(text: str | None) -> Cell:
    if text is None:
        return Cell(text=NOTHING)
    try:
        value = float(text)
    except ValueError:
        return Cell(text=text, value=text)
    # What a sweep has drawn has seventeen digits.
    return Cell(text=min(f"{value:.4g}", text, key=len), value=value, note=text)


def _range(values: Sequence[float]) -> str:
    low, high = f"{min(values):.4g}", f"{max(values):.4g}"
    return low if low == high else f"{low}-{high}"
