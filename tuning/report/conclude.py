"""Report a sweep's results in the terminal, in its folder and in MLflow."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from tempfile import TemporaryDirectory

from pipelines import tracking
from pipelines.errors import RunFailedError
from pipelines.storage.redaction import command_line, without_credentials
from pipelines.storage.retry import answering
from pipelines.tracking.sweeps import log_metrics, save_view
from tuning.report.figures import (
    draw_importances,
    draw_parallel,
    draw_pareto,
    draw_ranks,
)
from tuning.report.recipe import winner_recipe
from tuning.report.statistics import MIN_PAIRS, importances, rank_correlation
from tuning.report.table import as_csv, compared, table, winner_of
from tuning.trials.head_trial import HEAD_METRIC, rank_pairs
from tuning.trials.ledger import Ledger, Sweep, TrialRecord

REPORT = "report"
WINNER_FILE = "winner.py"


def write_report(
    sweep: Sweep, *, ledger: Ledger, heads: Ledger | None, uri: str
) -> TrialRecord | None:
    """Print the table, save table, plots and winner, and end the sweep's MLflow run.

    Returns the winner, None where no trial has a value.
    """
    entries = ledger.entries
    winner = winner_of(sweep.search, entries)
    text = table(sweep, entries)
    print(text)
    metrics = {f"num_{status}": float(num) for status, num in _counts(ledger).items()}
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "trials.txt").write_text(text + "\n")
        (folder / "trials.csv").write_text(as_csv(sweep, entries))
        if winner is not None:
            source = winner_recipe(sweep, winner)
            (folder / WINNER_FILE).write_text(source, encoding="ascii")
            value = winner.last(sweep.search.metric)
            assert value is not None
            metrics |= {f"best/{sweep.search.metric}": value}
            metrics |= {"best/trial": float(winner.number)}
            tracking.tag_run(
                uri,
                sweep.mlflow_run_id,
                tags={"best_trial": sweep.trial_name(winner.number)},
            )
        metrics |= _figures(sweep, ledger=ledger, heads=heads, folder=folder)
        _keep(sweep, folder=folder, uri=uri)
    log_metrics(uri, sweep.mlflow_run_id, metrics=metrics)
    view = save_view(
        uri,
        sweep=sweep.name,
        run_id=sweep.mlflow_run_id,
        experiment=sweep.run.experiment,
        fields=list(sweep.domains),
        metric=sweep.search.metric,
    )
    whole = all(entry.has_ended for entry in entries)
    tracking.end_run(
        uri,
        sweep.mlflow_run_id,
        status="FINISHED" if whole else "KILLED",
        reason="" if whole else "its budget is used up",
    )
    _print_next(sweep, winner=winner, is_whole=whole, uri=uri, view=view)
    return winner


def _counts(ledger: Ledger) -> dict[str, int]:
    statuses = [entry.status for entry in ledger.entries]
    return {status: statuses.count(status) for status in dict.fromkeys(statuses)}


def _figures(
    sweep: Sweep, *, ledger: Ledger, heads: Ledger | None, folder: Path
) -> dict[str, float]:
    """Draw the plots there is enough data for; return the computed metrics."""
    metrics: dict[str, float] = {}
    if compared(sweep.search, ledger.entries):
        draw_parallel(sweep, ledger.entries, folder / "parallel_coordinates.png")
        draw_pareto(sweep, ledger.entries, folder / "pareto.png")
    epoch, shares = importances(sweep, ledger.entries)
    if shares:
        draw_importances(
            sweep,
            ledger.entries,
            folder / "importances.png",
            found=(epoch, shares),
        )
        metrics |= {f"importance/{name}": share for name, share in shares.items()}
        shown = ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
        print(f"importance  {shown} (after epoch {epoch})")
    if heads is not None:
        metrics |= _foretelling(sweep, ledger=ledger, heads=heads, folder=folder)
    return metrics


def _foretelling(
    sweep: Sweep, *, ledger: Ledger, heads: Ledger, folder: Path
) -> dict[str, float]:
    """Measure and draw how well the heads' ranking predicts that of full training."""
    search = dataclasses.replace(sweep.search, metrics=(HEAD_METRIC,), modes=("max",))
    ranked_by_head = dataclasses.replace(sweep, search=search)
    (folder / "heads.csv").write_text(as_csv(ranked_by_head, heads.entries))
    cheap, full, numbers = rank_pairs(
        list(heads.entries), list(ledger.entries), sweep=sweep
    )
    if len(cheap) < MIN_PAIRS:
        print(f"ranks  too few to compare: {len(cheap)} settings trained in full")
        return {}
    spearman, kendall = rank_correlation(cheap, full)
    print(
        f"ranks  heads against full training, {len(cheap)} settings: "
        f"Spearman {spearman:.2f}, Kendall {kendall:.2f}"
    )
    draw_ranks(
        cheap,
        full,
        folder / "head_ranks.png",
        numbers=numbers,
        names=(HEAD_METRIC, sweep.search.metric),
    )
    return {"head/spearman": spearman, "head/kendall": kendall}


def _keep(sweep: Sweep, *, folder: Path, uri: str) -> None:
    place = sweep.folder.within(REPORT)
    with answering():
        place.make_folder()
        for file in sorted(folder.iterdir()):
            place.within(file.name).write(file.read_bytes())
    for file in sorted(folder.iterdir()):
        tracking.log_file(uri, sweep.mlflow_run_id, file=file)


def _print_next(
    sweep: Sweep, *, winner: TrialRecord | None, is_whole: bool, uri: str, view: str
) -> None:
    """Print the next steps: commands and addresses."""
    lines: dict[str, str] = {}
    report = sweep.folder.within(REPORT)
    if winner is not None:
        file = report.within(WINNER_FILE)
        lines["winner"] = f"{file}, a recipe to keep"
        if not file.is_remote:
            lines["winner"] = command_line("sovit-train", f"{file}:best")
    lines["report"] = str(report)
    lines["compare"] = command_line("sovit-compare", sweep.name, "--store", uri)
    server = uri if uri.startswith("http") else "http://127.0.0.1:5000"
    if view:
        lines["look"] = f"{without_credentials(server)}/{view}"
    if not uri.startswith("http"):
        lines["after"] = command_line("mlflow", "ui", "--backend-store-uri", uri)
    if not is_whole:
        more = ("--max-gpu-hours", "MORE")
        lines["go on"] = command_line("sovit-tune", "--resume", sweep.folder, *more)
    for name, line in lines.items():
        print(f"{name:<10}  {line}")


def check_something_came(ledger: Ledger) -> None:
    """Raise RunFailedError, with a reason, where not one trial reported anything."""
    if any(entry.reports for entry in ledger.entries):
        return
    why = next((entry.reason for entry in ledger.entries if entry.reason), "")
    if not why:
        hours = ledger.sweep.search.max_gpu_hours
        too_few = f"{hours:g} hours were too few; raise --max-gpu-hours"
        why = too_few if hours else "none has begun"
    raise RunFailedError(
        f"expected a trial that reports something, got none of {len(ledger.entries)}: "
        f"{why}"
    )
