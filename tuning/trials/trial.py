"""Trainable that Ray Tune calls: trains one trial of a sweep.

A recipe without workers is trained in Tune's own process. Of one with workers, that
process only waits and forwards reports; the training is started by an actor below it,
which ends with it when Tune stops the trial. Ray Train's helpers, which free the
workers' resources after that, find their Ray by an address in their environment:
without it they can't tell two Rays on a machine apart, and the sweep waits forever.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import ray
import ray.train
from ray import tune
from ray.actor import ActorClass
from ray.exceptions import RayError
from ray.train import UserCallback
from ray.tune.integration.ray_train import TuneReportCallback
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipelines.config.own_code import OwnCode
from pipelines.driver.failures import causes, first_line
from pipelines.errors import NonFiniteLossError, RunFailedError, StoppedEarly
from pipelines.storage.redaction import error_summary

# Settings that are known before lie one level deeper, in a list for Tune.
NUMBER, SETTING, LISTED = "number", "setting", "listed"
OUTCOME, REASON = "outcome", "reason"
EPOCH = "epoch"
_END_TIMEOUT_S = "60"


@dataclass(frozen=True, kw_only=True)
class TrialContext:
    """What every trial of a stage knows about its sweep.

    Plain values: a `Run` would import torch, which costs each of a trial's processes
    seconds.
    """

    sweep: str
    """Name of the sweep."""
    sweep_id: str
    run: str
    """The run that every trial changes, as JSON."""
    metrics: tuple[str, ...]
    parent_id: str
    """Id of the sweep's run in MLflow."""
    tracking_uri: str
    is_own_ray: bool
    """Whether the Ray was started for this sweep, on this machine."""
    is_local: bool
    """Whether a trial trains in Tune's own process."""
    node_id: str
    """Ray's name of the machine that the sweep's driver runs on."""
    told: Mapping[int, Sequence[Mapping[str, Any]]]
    """Reports of trials that ended in an earlier start of the sweep, by number."""
    code: OwnCode | None = None
    """The user's own recipe file, which may register the model."""


def trial_name(sweep: str, number: int, *, kind: str = "") -> str:
    """Return the name of a trial's run, as `--resume` and `sovit-eval` take it."""
    return f"{sweep}-{kind}{number:04d}"


def config_of(number: int, setting: Mapping[str, Any]) -> dict[str, Any]:
    """Build the config that Tune passes to a trial."""
    return {NUMBER: number, SETTING: dict(setting)}


def number_of(config: Mapping[str, Any]) -> int:
    """Return a trial's number from its config."""
    return config.get(LISTED, config)[NUMBER]


def setting_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the searched fields from a trial's config."""
    return tidy(config.get(LISTED, config)[SETTING])


def tidy(setting: Mapping[str, Any]) -> dict[str, Any]:
    """Round floats to ten digits: steps of 0.05 give 0.6000000000000001 for 0.6."""
    return {
        name: float(f"{value:.10g}") if isinstance(value, float) else value
        for name, value in setting.items()
    }


class ReportHere(UserCallback):
    """Callback that reports epochs to Tune when it trains in its own process."""

    def after_report(
        self,
        run_context: Any,
        metrics: list[dict[str, Any]],
        checkpoint: ray.train.Checkpoint | None,
    ) -> None:
        """Report an epoch's metrics to Tune; raise StoppedEarly if Tune stops it."""
        if EPOCH not in metrics[0]:
            return
        try:
            tune.report(metrics[0])
        except SystemExit as end:
            raise StoppedEarly(end.code) from None


def run_trial(config: Mapping[str, Any], *, known: TrialContext) -> None:
    """Train one setting, or replay what an earlier start of the sweep reported."""
    number = number_of(config)
    if number in known.told:
        tell_again(known.told[number])
        return
    try:
        train = _train_here if known.is_local else _train_below
        last = train(
            known, name=trial_name(known.sweep, number), setting=setting_of(config)
        )
    except (RayError, RunFailedError, ValueError) as error:
        end = bad_end(error, metrics=known.metrics)
        tune.report(end)
        if end[OUTCOME] == "failed":
            raise  # Tune tries again
        return
    if last is not None:
        tune.report(last)


def _train_here(
    known: TrialContext, *, name: str, setting: Mapping[str, Any]
) -> dict[str, Any] | None:
    # Before the next trial begins in this process, the last one ends its run.
    os.environ.setdefault("TUNE_FUNCTION_THREAD_TIMEOUT_S", _END_TIMEOUT_S)
    return Trainer().train(known, name=name, setting=setting, callback=ReportHere())


def _train_below(
    known: TrialContext, *, name: str, setting: Mapping[str, Any]
) -> dict[str, Any] | None:
    settings = {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    if known.is_own_ray:
        # Nobody takes a laptop away with notice; the watcher is a process a trial.
        settings["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"
    trainer = cast(ActorClass, ray.remote(num_cpus=0)(Trainer)).options(
        runtime_env={"env_vars": settings},
        # It is this training's driver, so it must find MLflow where the sweep does.
        scheduling_strategy=NodeAffinitySchedulingStrategy(known.node_id, soft=False),
    )
    trainer = trainer.remote()
    return ray.get(
        trainer.train.remote(
            known, name=name, setting=setting, callback=TuneReportCallback()
        )
    )


def tell_again(reports: Sequence[Mapping[str, Any]]) -> None:
    """Replay earlier reports, to restore the scheduler's and the searcher's state."""
    for report in reports:
        tune.report(dict(report))


def bad_end(error: BaseException, *, metrics: Sequence[str]) -> dict[str, Any]:
    """Build the last report of a trial that has failed, diverged or was refused."""
    outcome, reason = "failed", error_summary(error)
    for cause in causes(error):
        if isinstance(cause, ValueError):
            outcome, reason = "refused", first_line(cause)
            if isinstance(cause, NonFiniteLossError):
                outcome = "diverged"
            break
        if isinstance(cause, RunFailedError):
            reason = first_line(cause)
    return last_report(outcome, reason, metrics=metrics)


def last_report(outcome: str, reason: str, *, metrics: Sequence[str]) -> dict[str, Any]:
    """Build the report of a bad end, whose metrics are NaN."""
    # Before any epoch, so that asha compares it nowhere.
    values = dict.fromkeys(metrics, math.nan) | {EPOCH: 0}
    return values | {OUTCOME: outcome, REASON: reason}


class Trainer:
    """Trainer in Tune's process, or an actor beside it that ends with it."""

    def train(
        self,
        known: TrialContext,
        *,
        name: str,
        setting: Mapping[str, Any],
        callback: UserCallback,
    ) -> dict[str, Any] | None:
        """Train or resume a run; return the last metrics of a resumed one.

        The sweep may have been killed just before it recorded them.
        """
        from pipelines.checkpoints.run_record import find_record
        from pipelines.config.overrides import change_fields
        from pipelines.config.recipes import load_code
        from pipelines.config.serialization import from_json
        from pipelines.driver.fit import fit
        from pipelines.tracking.sweeps import child_tags

        if known.code:
            load_code(known.code)
        run = change_fields(from_json(known.run), setting)
        record = find_record(run.storage, name=name)
        if record is not None and record.sweep_id != known.sweep_id:
            raise ValueError(
                f"expected no run {name!r} in {run.storage!r}, or one of this sweep, "
                "got another's; move it away, or begin a sweep of another --name"
            )
        trained = fit(
            run if record is None else record.run,
            name=name,
            record=record,
            callbacks=[callback],
            tracking_uri=known.tracking_uri,
            tags=child_tags(known.sweep, parent_id=known.parent_id),
            keep_model=False,
            ends_on_sigterm=False,
            code=known.code,
            sweep_id=known.sweep_id,
        )
        return None if record is None else dict(trained.metrics)
