"""Train the cells of plans, or write the page of what was measured.

    python -m benchmarks.evidence so_vit --data DATA
    python -m benchmarks.evidence pooling schedules --data DATA --num-concurrent 2
    python -m benchmarks.evidence --report

DATA has a folder for each set of photographs, as Hugging Face Parquet. Cells that are
in the file of results are not trained again, so that the work goes on where it was
stopped; `--report` needs that file alone.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import (
    FIRST_COMPLETED,
    Executor,
    Future,
    ProcessPoolExecutor,
    wait,
)
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from benchmarks.evidence.page import write_page
from benchmarks.evidence.plan import Cell, Plan
from benchmarks.evidence.plans import PLANS
from benchmarks.evidence.results import (
    Entry,
    next_cells,
    read_entries,
    write_entries,
)
from benchmarks.evidence.train import make_sets, train_cell
from pipelines.cli.command import parse, run_command

_PROG = "benchmarks.evidence"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Which plans are trained, on what, and where the figures go."""

    plans: tyro.conf.Positional[tuple[str, ...]] = ()
    data: Path | None = None
    """Folder of the sets of photographs."""
    work: Path = Path("runs/evidence")
    """Folder of shards, checkpoints and MLflow's store; it may be deleted."""
    num_concurrent: int = 1
    """Cells that train at a time, each in a process with one thread."""
    max_hours: float = 0.0
    """Hours after which no further cell begins; 0 is no limit."""
    results: Path = Path("benchmarks/results/evidence.json")
    report: bool = False
    """Write the page and its figures."""
    docs: Path = Path("docs")
    """Folder that the page and its figures go to."""

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.plans) - set(PLANS)):
            raise ValueError(f"expected plans of {list(PLANS)}, got {unknown}")
        if bool(self.plans) != (self.data is not None):
            raise ValueError("expected plans and --data DIR together; give both")
        if not (self.plans or self.report):
            raise ValueError(f"expected a plan of {list(PLANS)} or --report")
        if self.num_concurrent < 1:
            raise ValueError(
                "expected at least 1 cell at a time, got "
                f"{self.num_concurrent}; set --num-concurrent"
            )


def measure(plan: Plan, *, options: Options) -> None:
    """Train the cells of a plan that the file of results lacks, and add them to it.

    A cell that failed is tried once, and again at the next start.
    """
    assert options.data is not None
    make_sets(plan.images, data=options.data, work=options.work)
    train = functools.partial(train_cell, data=options.data, work=options.work)
    end_s = time.monotonic() + options.max_hours * 3600
    tried: set[str] = set()

    def todo() -> list[Cell]:
        if options.max_hours and time.monotonic() > end_s:
            return []
        cells = next_cells(plan, read_entries(options.results))
        return [cell for cell in cells if cell.key not in tried]

    with _trainer(options.num_concurrent) as trainer:
        running: dict[Future[Entry], Cell] = {}
        while True:
            for cell in todo()[: options.num_concurrent - len(running)]:
                tried.add(cell.key)
                running[trainer.submit(train, cell)] = cell
            if not running:
                return
            ended, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in ended:
                _keep(running.pop(future), future.result(), path=options.results)


def _keep(cell: Cell, entry: Entry, *, path: Path) -> None:
    """Add an entry to the file, which others may have written to meanwhile."""
    write_entries(path, {**read_entries(path), cell.key: entry})
    reached = f"{entry['top1']:.2f} %" if "top1" in entry else entry["status"]
    print(f"{cell.key}: {reached}, {entry['seconds']:.0f} s", flush=True)


class _Here(Executor):
    """Train in this process: signals reach it, and nothing is imported again."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **_: Any) -> Future[Any]:
        """Call at once; what it raises is raised here."""
        future: Future[Any] = Future()
        future.set_result(fn(*args))
        return future


def _trainer(num_concurrent: int) -> Executor:
    """Return what trains so many cells at a time, one process each, or one here.

    A process trains one cell after another: its start takes some 20 CPU seconds, of
    Python's imports and MLflow.
    """
    if num_concurrent == 1:
        return _Here()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(num_concurrent, mp_context=context)


def _main(arguments: Sequence[str]) -> None:
    options = parse(Options, arguments=arguments, prog=_PROG, text=__doc__)
    for name in options.plans:
        measure(PLANS[name], options=options)
    if options.report:
        write_page(PLANS.values(), read_entries(options.results), docs=options.docs)


if __name__ == "__main__":
    run_command(_main, prog=_PROG)
