"""Compare runs that MLflow keeps: `sovit-compare RUN...`.

    sovit-compare demo-20260801-101500 demo-20260801-113000
    sovit-compare my-sweep --html sweep.html
    sovit-compare experiment:sovit --sort images/s --csv runs.csv
    sovit-compare 3f2a9c my-sweep --metric val/loss --store http://server:5000

RUN is a run's name, an id or its beginning, a sweep's name (all its trials), or
experiment:NAME (all its runs). Runs that differ only in their seed are one row, with
the mean and the sample deviation.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro
from tqdm import tqdm

from pipelines.cli.command import parse, run_command
from pipelines.cli.outputs import check_file, check_plot
from pipelines.results.html_page import page_of
from pipelines.results.plots import Chart, as_svg, charts_of, draw
from pipelines.results.rows import ComparedRun, Mode, group
from pipelines.results.text_table import LOSS, RATE, TOP1, Table, tabulate
from pipelines.storage.redaction import without_credentials
from pipelines.tracking import default_uri
from pipelines.tracking.query import RunStore, StoredRun

_PROG = "sovit-compare"
_RATE = "train/images_per_s"
_EPOCH = "epoch"
# Of such metrics less is better.
_FALLING = ("loss", "error")
# Into a pipe or a file: nobody scrolls sideways there.
_WIDTH_WITHOUT_TERMINAL = 200


@dataclass(frozen=True, kw_only=True)
class Options:
    """Which runs are compared, by what, and the files to write."""

    runs: tyro.conf.Positional[tuple[str, ...]]
    """Names, ids, sweeps or experiment:NAME."""
    metric: str = TOP1
    """What they are compared by."""
    mode: Literal["auto", "max", "min"] = "auto"
    """Whether more is better; auto: less is, of a loss or an error."""
    sort: str = "final"
    """Column to sort by: final and best with the best first, others rising."""
    reverse: bool = False
    """Sort the other way round."""
    each: bool = False
    """Show every run in a row of its own, seeds too."""
    html: str = ""
    """Page to write: the table and plots, in one file."""
    csv: str = ""
    """CSV file to write, with whole numbers."""
    plot: str = ""
    """Picture to write: PNG, SVG or PDF."""
    store: str = ""
    """MLflow's address; that of the storage folder if empty."""
    storage: str = "runs"
    """Folder that the runs were trained in."""

    def __post_init__(self) -> None:
        if not self.runs:
            raise ValueError(
                "expected runs to compare, got none; name runs, a sweep or "
                "experiment:NAME"
            )

    def check(self) -> None:
        """Raise ValueError if a file can't be written, before runs are read."""
        for name in ("html", "csv"):
            check_file(getattr(self, name), option=name)
        check_plot(self.plot)

    @property
    def direction(self) -> Mode:
        """Whether a higher (`max`) or a lower (`min`) metric is better."""
        if self.mode != "auto":
            return self.mode
        return "min" if any(word in self.metric for word in _FALLING) else "max"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A table of runs, and its source."""

    options: Options
    place: str
    """MLflow's address, without a password."""
    table: Table = field(repr=False)

    @property
    def summary(self) -> str:
        """One line on what is compared by which metric."""
        rows = self.table.rows
        num_runs, num_rows = sum(len(row.runs) for row in rows), len(rows)
        text = f"{num_runs:,} {'run' if num_runs == 1 else 'runs'}"
        if num_rows < num_runs:
            text += f" in {num_rows:,} {'row' if num_rows == 1 else 'rows'}"
        text += f", by {self.options.metric}"
        if num_rows < num_runs:
            text += "; ± is the sample deviation over seeds"
        return text

    @property
    def charts(self) -> list[Chart]:
        """The charts that have data."""
        options = self.options
        return charts_of(self.table, metric=options.metric, mode=options.direction)


def compare(options: Options) -> Comparison:
    """Read runs from MLflow and tabulate them.

    Raises ValueError where MLflow does not answer, a run is not found, or none of them
    has the metric.
    """
    options.check()
    uri = options.store or default_uri(options.storage)
    store = RunStore(uri)
    found = store.find(options.runs)
    _check_metric(found, metric=options.metric)
    histories = tqdm(found, unit="run", desc="reading", disable=None, leave=False)
    table = tabulate(
        group(
            [_with_histories(store, run, metric=options.metric) for run in histories],
            each=options.each,
        ),
        metric=options.metric,
        mode=options.direction,
        each=options.each,
    )
    falling = options.sort in ("final", "best") and options.direction == "max"
    return Comparison(
        options=options,
        place=without_credentials(uri),
        table=table.sorted(options.sort, falling=falling != options.reverse),
    )


def as_page(comparison: Comparison) -> str:
    """Write a comparison as one HTML page."""
    mode = comparison.options.direction
    best: dict[str, Mode] = {"final": mode, "best": mode, RATE: "max"}
    return page_of(
        comparison.table.to_html(best=best),
        title=f"Runs compared: {', '.join(comparison.options.runs)}",
        notes=(
            f"{comparison.summary}. Click a heading to sort.",
            f"Read from {comparison.place}, {time.strftime('%Y-%m-%d %H:%M')}.",
        ),
        charts=[(chart.title, as_svg(chart)) for chart in comparison.charts],
    )


def _with_histories(store: RunStore, run: StoredRun, *, metric: str) -> ComparedRun:
    def history(name: str) -> tuple:
        # Asking for what was never logged would be one more call to a server.
        return store.history(run.run_id, metric=name) if name in run.metrics else ()

    return ComparedRun(
        run=run,
        curve=history(metric),
        losses=history(LOSS),
        rates=history(_RATE),
        epochs=history(_EPOCH),
    )


def _check_metric(runs: Iterable[StoredRun], *, metric: str) -> None:
    """Raise ValueError for a metric that no run has, unless none has any yet."""
    there = {name for run in runs for name in run.metrics}
    if there and metric not in there:
        raise ValueError(
            f"metric: expected one that a run has, got {metric!r}; there are "
            f"{', '.join(sorted(there))}"
        )


def _write(comparison: Comparison) -> list[str]:
    """Write the requested files; return a line for each."""
    options, lines = comparison.options, []
    if options.html:
        Path(options.html).write_text(as_page(comparison), encoding="utf-8")
        lines.append(f"page     {options.html}")
    if options.csv:
        Path(options.csv).write_text(comparison.table.to_csv(), encoding="utf-8")
        lines.append(f"table    {options.csv}")
    if options.plot:
        if not comparison.charts:
            raise ValueError(
                f"plot: expected runs with an epoch of {options.metric}, got none yet"
            )
        draw(comparison.charts, path=Path(options.plot))
        lines.append(f"picture  {options.plot}")
    return lines


def _main(arguments: Sequence[str]) -> None:
    options = parse(Options, arguments=arguments, prog=_PROG, text=__doc__)
    comparison = compare(options)
    width = shutil.get_terminal_size((_WIDTH_WITHOUT_TERMINAL, 0)).columns
    _print(f"{comparison.summary}\n\n{comparison.table.to_text(width=width)}")
    for line in _write(comparison):
        _print(line)


def _print(text: str) -> None:
    """Print text, with `?` for characters that the terminal can't encode."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, errors="replace").decode(encoding))


def main() -> None:
    """Run the command line."""
    run_command(_main, prog=_PROG)


if __name__ == "__main__":
    main()
