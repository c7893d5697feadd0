"""Check a sweep before anything of it is written."""

from __future__ import annotations

from pipelines.config import Run
from pipelines.preflight import check_run
from tuning.options import Search


def check_sweep(run: Run, *, search: Search) -> None:
    """Raise ValueError for what can't be searched so, and as `check_run`."""
    check_run(run)
    if run.validation.beside or run.validation.every_epochs > 1:
        raise ValueError(
            "wanted trials that are evaluated after each epoch, by which they are "
            "compared, came --validation.beside or --validation.every-epochs; leave "
            "them out"
        )
    if search.method == "optuna" and search.head_from:
        raise ValueError(
            "wanted settings that are known before the heads are tried, came --method "
            "optuna; take random or grid, or leave out --head-from"
        )
