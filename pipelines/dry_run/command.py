"""Show what a run will do: `sovit-train RECIPE ... --dry-run [--plot FILE]`."""

from __future__ import annotations

import sys
from pathlib import Path

from pipelines.checkpoints.run_record import Record
from pipelines.cli.outputs import check_plot
from pipelines.config import Run
from pipelines.dry_run.explain import explain_run
from pipelines.dry_run.lr_plot import draw_picture
from pipelines.dry_run.report import as_text


def show_dry_run(
    run: Run, *, name: str, record: Record | None = None, plot: str = ""
) -> None:
    """Print what a run will do, without starting anything.

    Args:
        record: That of the run to go on with; None for a new run.
        plot: Picture of the learning rate to write; none if empty.

    Raises ValueError where the run would not start either, or nothing can be drawn.
    """
    check_plot(plot)
    found = explain_run(run, name=name, record=record)
    text = as_text(found)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        text = as_text(found, is_plain=True)
    print(text)
    if plot:
        draw_picture(
            found.run.optim,
            steps_per_epoch=found.course.steps_per_epoch,
            title=found.run.recipe,
            path=Path(plot),
        )
        print(f"picture     {plot}")
