"""Carry out a sweep: the driver's part, from the checks to the report."""

from __future__ import annotations

import dataclasses
import functools
import logging

from pipelines import tracking
from pipelines.preflight import check_run
from pipelines.runs import find_record
from pipelines.session import needed, ray_session, room
from pipelines.tracking.provenance import provenance_tags
from pipelines.tracking.sweeps import OUTCOME_TAG, open_sweep, tag_run
from tuning.entries import Entry, Ledger, Sweep, write_sweep
from tuning.settings import list_settings
from tuning.spaces import Space
from tuning.stage import (
    optuna_of,
    placement_groups,
    run_stage,
    scheduler_of,
    wait_until_free,
)
from tuning.trial import Known, run_trial
from tuning.watch import Watch

logger = logging.getLogger(__name__)


def carry_out(sweep: Sweep, *, space: Space, retries_failed: bool = False) -> Ledger:
    """Try all settings of a sweep, new or not, and report what came.

    Args:
        retries_failed: Whether trials that failed before are tried once more.

    Raises ValueError for what the user can mend, before anything is written;
    RunFailedError where not one trial reported anything.
    """
    run, search = sweep.run, sweep.search
    check_run(run)
    scheduler_of(search, num_epochs=run.optim.total_epochs)
    settings = [] if search.method == "optuna" else list_settings(space, search=search)
    uri = tracking.default_uri(run.storage)
    num_runs = max(search.num_concurrent, 1)
    with ray_session(run.scale, num_runs=num_runs, dashboard=True):
        num_concurrent = search.num_concurrent or room(run.scale)
        sweep = _opened(sweep, uri=uri)
        ledger = Ledger(sweep, stage="full")
        _fill(ledger, settings, retries_failed=retries_failed)
        logger.info(
            "sweep %s: %d trials, %d at a time",
            sweep.name,
            search.num_trials,
            num_concurrent,
        )
        _train_all(ledger, space=space, uri=uri, num_concurrent=num_concurrent)
    return ledger


def _opened(sweep: Sweep, *, uri: str) -> Sweep:
    """Open the sweep's run in MLflow, and write the sweep down."""
    run_id = open_sweep(
        uri,
        experiment=sweep.run.experiment,
        name=sweep.name,
        params={f"space.{name}": words for name, words in sweep.domains.items()}
        | {
            f"search.{name}": value
            for name, value in dataclasses.asdict(sweep.search).items()
        }
        | {"recipe": sweep.recipe},
        tags=provenance_tags(),
        run_id=sweep.mlflow_run_id,
    )
    sweep = dataclasses.replace(sweep, mlflow_run_id=run_id)
    write_sweep(sweep)
    return sweep


def _fill(ledger: Ledger, settings: list[dict], *, retries_failed: bool) -> None:
    """Put all settings that are known before into the ledger."""
    for entry in ledger.entries:
        if entry.status == "failed" and retries_failed:
            ledger.change(entry.number, status="waiting")
    for number, setting in enumerate(settings):
        if number not in ledger:
            ledger.put(Entry(number=number, setting=setting))


def _train_all(ledger: Ledger, *, space: Space, uri: str, num_concurrent: int) -> None:
    sweep, run = ledger.sweep, ledger.sweep.run
    known = Known(
        sweep=sweep,
        entries={entry.number: entry for entry in ledger.entries if entry.has_ended},
        tracking_uri=uri,
    )
    searcher = None
    if sweep.search.method == "optuna":
        searcher, space = optuna_of(space, ledger)
    num_epochs = run.optim.total_epochs
    watch = Watch(
        ledger,
        num_epochs=num_epochs,
        on_end=functools.partial(_end, ledger=ledger, uri=uri),
    )
    wanted = needed(run.scale)
    before = placement_groups()
    try:
        run_stage(
            ledger,
            trainable=functools.partial(run_trial, known=known),
            watch=watch,
            scheduler=scheduler_of(sweep.search, num_epochs=num_epochs),
            searcher=searcher,
            space=space,
            num_concurrent=num_concurrent,
            num_devices=wanted.get("GPU", run.scale.num_workers),
        )
    finally:
        watch.close()
    wait_until_free(before)


def _end(entry: Entry, *, ledger: Ledger, uri: str) -> None:
    """Give a trial's run in MLflow its end: a stopped trial can't do it itself."""
    sweep = ledger.sweep
    record = find_record(sweep.run.storage, name=sweep.trial_name(entry.number))
    if record is None:
        return
    run_id = record.mlflow_run_id
    ledger.change(entry.number, mlflow_run_id=run_id)
    tag_run(uri, run_id, tags={OUTCOME_TAG: entry.status})
    if entry.status == "stopped":
        tracking.end_run(uri, run_id, status="FINISHED")
    elif entry.status == "failed":
        tracking.end_run(uri, run_id, status="FAILED", reason=entry.reason)
