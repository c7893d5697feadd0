"""Run a sweep: the driver's part, from the checks to the report."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import os
from collections.abc import Callable, Iterator, Sequence

import ray
from ray.tune.schedulers import TrialScheduler

from pipelines import tracking
from pipelines.checkpoints.run_record import find_record
from pipelines.config.overrides import change_fields
from pipelines.config.serialization import flat_params, to_json
from pipelines.driver.cluster import needed, per_worker, ray_session, room
from pipelines.driver.preflight import resume_command
from pipelines.driver.signals import StopRequest, stop_requests
from pipelines.errors import InterruptedRun
from pipelines.storage.lease import claimed
from pipelines.tracking import provenance_tags
from pipelines.tracking.sweeps import (
    OUTCOME_TAG,
    child_tags,
    log_child,
    open_sweep,
)
from tuning.checks import check_sweep, check_sweep_name
from tuning.report.conclude import check_something_came, write_report
from tuning.spaces import Space, list_settings
from tuning.stage import (
    TRIAL_RESOURCES,
    check_state_api,
    live_actors,
    optuna_of,
    placement_groups,
    run_stage,
    scheduler_of,
    wait_until_free,
)
from tuning.trials.head_trial import HEAD_METRIC, TOKENS, promoted, run_head_trial
from tuning.trials.ledger import BAD, Ledger, StageName, Sweep, TrialRecord, write_sweep
from tuning.trials.trial import TrialContext, run_trial
from tuning.watch import TrialRecorder

logger = logging.getLogger(__name__)
_PROG = "sovit-tune"


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Carried:
    """State of a sweep while it runs."""

    sweep: Sweep
    space: Space
    uri: str
    num_concurrent: int
    retries_failed: bool

    def ledger(self, stage: StageName, settings: Sequence[TrialRecord]) -> Ledger:
        """Open a stage's ledger, and add new trials to it."""
        ledger = Ledger(self.sweep, stage=stage)
        for entry in ledger.entries:
            if entry.status == "failed" and self.retries_failed:
                ledger.change(entry.number, status="waiting")
        for entry in settings:
            if entry.number not in ledger:
                ledger.put(entry)
        return ledger

    def known(self, ledger: Ledger) -> TrialContext:
        """Build the context of a stage's trials, with the reports of ended ones."""
        metrics = self.sweep.search.metrics
        if ledger.stage == "head":
            metrics = (HEAD_METRIC,)
        return TrialContext(
            sweep=self.sweep.name,
            sweep_id=self.sweep.id,
            run=to_json(self.sweep.run),
            metrics=metrics,
            parent_id=self.sweep.mlflow_run_id,
            tracking_uri=self.uri,
            is_own_ray=not os.environ.get("RAY_ADDRESS"),
            is_local=self.sweep.run.scale.is_local,
            node_id=ray.get_runtime_context().get_node_id(),
            code=self.sweep.code,
            told={
                entry.number: entry.told_again(metrics=metrics)
                for entry in ledger.entries
                if entry.has_ended
            },
        )


def carry_out(sweep: Sweep, *, space: Space, retries_failed: bool = False) -> Ledger:
    """Run a sweep, new or resumed, and report its results.

    Args:
        retries_failed: Whether trials that failed before are retried.

    Raises ValueError for user errors, before anything is written;
    RunFailedError where not one trial reported anything.
    """
    run, search = sweep.run, sweep.search
    check_sweep(run, search=search)
    _scheduler(sweep)
    settings = [] if search.method == "optuna" else list_settings(space, search=search)
    listed = [
        TrialRecord(number=n, setting=setting) for n, setting in enumerate(settings)
    ]
    uri = tracking.default_uri(run.storage)
    num_runs = max(search.num_concurrent, 1)
    with stop_requests() as stop, claimed(sweep.folder):
        with ray_session(run.scale, num_runs=num_runs, dashboard=True):
            stop.arm()
            if not sweep.mlflow_run_id:  # another may have begun and ended meanwhile
                check_sweep_name(run.storage, name=sweep.name)
            check_state_api()
            with stop.waiting():
                carried = _Carried(
                    sweep=_opened(sweep, uri=uri),
                    space=space,
                    uri=uri,
                    num_concurrent=search.num_concurrent or room(run.scale),
                    retries_failed=retries_failed,
                )
            with _ended_early(carried, stop=stop):
                stop.check()
                heads = None
                if search.head_from:
                    heads = _try_heads(carried, listed)
                    chosen = promoted(list(heads.entries), search=search)
                    listed = [
                        TrialRecord(number=one.number, setting=one.setting)
                        for one in chosen
                    ]
                ledger = _train(carried, listed)
            stop.finish()
        write_report(carried.sweep, ledger=ledger, heads=heads, uri=uri)
    check_something_came(ledger)
    return ledger


@contextlib.contextmanager
def _ended_early(carried: _Carried, *, stop: StopRequest) -> Iterator[None]:
    """Mark the sweep and its running trials KILLED in MLflow when a signal ends it.

    The trials die with the Ray that they run on, so they can't do it themselves.
    """
    sweep = carried.sweep
    go_on = f"go on with {resume_command(sweep.run, name=sweep.name, prog=_PROG)}"
    try:
        with stop.restored():
            yield
    except (KeyboardInterrupt, SystemExit) as error:
        with stop.waiting():
            for entry in Ledger(sweep, stage="full").entries:
                record = find_record(
                    sweep.run.storage, name=sweep.trial_name(entry.number)
                )
                is_ours = record is not None and record.sweep_id == sweep.id
                if record is not None and is_ours and not entry.has_ended:
                    _kill(record.mlflow_run_id, uri=carried.uri)
            _kill(sweep.mlflow_run_id, uri=carried.uri)
        if isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt(go_on) from error
        status = error.code if isinstance(error.code, int) else 1
        raise InterruptedRun(f"{error}; {go_on}", status=status) from error


def _kill(run_id: str, *, uri: str) -> None:
    tracking.end_run(uri, run_id, status="KILLED", reason="the sweep was interrupted")


def _scheduler(sweep: Sweep) -> TrialScheduler:
    """Build the full trainings' scheduler; promoted settings are never stopped."""
    search = sweep.search
    if search.head_from:
        search = dataclasses.replace(search, scheduler="none")
    return scheduler_of(search, num_epochs=sweep.run.optim.total_epochs)


def _opened(sweep: Sweep, *, uri: str) -> Sweep:
    """Create the sweep's run in MLflow, and write the sweep's record."""
    searched = {f"space.{name}": words for name, words in sweep.domains.items()}
    search = dataclasses.asdict(sweep.search)
    params = {f"search.{name}": value for name, value in search.items()}
    run_id = open_sweep(
        uri,
        experiment=sweep.run.experiment,
        name=sweep.name,
        params=searched | params | {"recipe": sweep.recipe},
        tags=provenance_tags(),
        run_id=sweep.mlflow_run_id,
        id=sweep.id,
    )
    sweep = dataclasses.replace(sweep, mlflow_run_id=run_id)
    write_sweep(sweep)
    return sweep


def _train(carried: _Carried, listed: Sequence[TrialRecord]) -> Ledger:
    """Train settings in full."""
    ledger = carried.ledger("full", listed)
    sweep, search = carried.sweep, carried.sweep.search
    searcher, space = None, carried.space
    if search.method == "optuna":
        searcher, space = optuna_of(space, ledger)
    end = functools.partial(_end, ledger=ledger, uri=carried.uri)
    _mend(ledger, end)
    num_epochs = sweep.run.optim.total_epochs
    num_trials = search.num_trials if searcher else len(ledger.entries)
    watch = TrialRecorder(
        ledger,
        metric=search.metric,
        num_epochs=num_epochs,
        num_trials=num_trials,
        on_end=end,
    )
    scale = sweep.run.scale
    logger.info(
        "sweep %s: %d trials, %d at a time",
        sweep.name,
        num_trials,
        carried.num_concurrent,
    )
    _watched(
        watch,
        lambda: run_stage(
            ledger,
            trainable=functools.partial(run_trial, known=carried.known(ledger)),
            watch=watch,
            scheduler=_scheduler(sweep),
            searcher=searcher,
            space=space,
            num_concurrent=carried.num_concurrent,
            # Alone, Tune's processes train, and torch starts once for many trials.
            resources=per_worker(scale) if scale.is_local else TRIAL_RESOURCES,
            reuse_actors=scale.is_local,
            num_devices=needed(scale).get("GPU", scale.world_size),
        ),
    )
    return ledger


def _try_heads(carried: _Carried, listed: Sequence[TrialRecord]) -> Ledger:
    """Compute the backbone's tokens, and train a head on them for each setting."""
    from tuning.heads.extract import write_tokens

    sweep, search = carried.sweep, carried.sweep.search
    tokens = str(sweep.folder.within(TOKENS))
    write_tokens(sweep.run, checkpoint=search.head_from, out=tokens)
    ledger = carried.ledger("head", listed)
    end = functools.partial(_end_head, ledger=ledger, uri=carried.uri)
    _mend(ledger, end)
    watch = TrialRecorder(
        ledger,
        metric=HEAD_METRIC,
        num_epochs=search.head_epochs,
        num_trials=len(ledger.entries),
        on_end=end,
    )
    use_gpu = sweep.run.scale.use_gpu
    logger.info("%d heads on the tokens in %s", len(ledger.entries), tokens)
    plain = dataclasses.replace(search, scheduler="none")
    _watched(
        watch,
        lambda: run_stage(
            ledger,
            trainable=functools.partial(
                run_head_trial,
                known=carried.known(ledger),
                tokens=tokens,
                num_epochs=search.head_epochs,
            ),
            watch=watch,
            scheduler=scheduler_of(plain, num_epochs=search.head_epochs),
            num_concurrent=carried.num_concurrent,
            resources={"CPU": 1.0} | ({"GPU": 1.0} if use_gpu else {}),
            num_devices=1,
            reuse_actors=True,
        ),
    )
    return ledger


def _watched(watch: TrialRecorder, run: Callable[[], None]) -> None:
    """Run a stage; wait until its stopped trials' resources are released."""
    before = live_actors() | placement_groups()
    try:
        run()
    finally:
        watch.close()
    wait_until_free(before)


def _end(entry: TrialRecord, *, ledger: Ledger, uri: str) -> None:
    """End a trial's run in MLflow: a stopped trial can't do it itself."""
    sweep = ledger.sweep
    record = find_record(sweep.run.storage, name=sweep.trial_name(entry.number))
    if record is None or record.sweep_id != sweep.id:
        return
    run_id = record.mlflow_run_id
    tracking.tag_run(uri, run_id, tags={OUTCOME_TAG: entry.status})
    if entry.status == "stopped":
        tracking.end_run(uri, run_id, status="FINISHED")
    elif entry.status == "failed":
        tracking.end_run(uri, run_id, status="FAILED", reason=entry.reason)
    # Last: a trial without an id has its end still to come, see `_mend`.
    ledger.change(entry.number, mlflow_run_id=run_id)


def _mend(ledger: Ledger, end: Callable[[TrialRecord], None]) -> None:
    """End the MLflow runs of trials whose end the killed sweep did not record."""
    for entry in ledger.entries:
        if entry.has_ended and not entry.mlflow_run_id:
            end(entry)


def _end_head(entry: TrialRecord, *, ledger: Ledger, uri: str) -> None:
    """Record a head's trial in MLflow; it was too short to do so itself."""
    sweep = ledger.sweep
    try:
        run = change_fields(sweep.run, entry.setting)
    except ValueError:
        run = sweep.run
    tags = child_tags(sweep.name, parent_id=sweep.mlflow_run_id)
    run_id = log_child(
        uri,
        experiment=run.experiment,
        name=sweep.trial_name(entry.number, stage="head"),
        params=flat_params(run) | dict(entry.setting),
        tags=tags | {OUTCOME_TAG: entry.status},
        reports=entry.reports,
    )
    tracking.end_run(
        uri,
        run_id,
        status="FAILED" if entry.status in BAD else "FINISHED",
        reason=entry.reason,
    )
    ledger.change(entry.number, mlflow_run_id=run_id)
