"""Train one trial of a sweep: what Ray Tune calls.

Tune's process only waits and passes reports on; the training is started by an actor
below it, which ends with it when Tune stops the trial. Ray Train's helpers, which free
the workers' resources after that, find their Ray by an address in their environment:
without it they can't tell two Rays on a machine apart, and the sweep waits for ever.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import ray
import ray.train
from ray import tune
from ray.actor import ActorClass
from ray.exceptions import RayError
from ray.tune.integration.ray_train import TuneReportCallback

from pipelines.config import Run
from pipelines.errors import NonFiniteLossError, RunFailedError
from pipelines.failures import causes, first_line
from pipelines.fields import change_fields
from pipelines.runs import find_record
from pipelines.tracking.sweeps import child_tags
from tuning.entries import Entry, Sweep
from tuning.spaces import tidy

# Settings that are known before lie one level deeper, in a list for Tune.
NUMBER, SETTING, LISTED = "number", "setting", "listed"
OUTCOME, REASON = "outcome", "reason"
EPOCH = "epoch"


@dataclass(frozen=True, kw_only=True)
class Known:
    """Hold what every trial of a stage is told."""

    sweep: Sweep
    entries: Mapping[int, Entry]
    """Trials of an earlier start that have ended."""
    tracking_uri: str


def config_of(entry: Entry) -> dict[str, Any]:
    """Give what Tune hands to the trial of an entry."""
    return {NUMBER: entry.number, SETTING: dict(entry.setting)}


def number_of(config: Mapping[str, Any]) -> int:
    """Take a trial's number out of what Tune hands to it."""
    return config.get(LISTED, config)[NUMBER]


def setting_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Take the searched fields out of what Tune hands to a trial."""
    return tidy(config.get(LISTED, config)[SETTING])


class ReportEpochs(TuneReportCallback):
    """Pass on to Tune what epochs report; checkpoints within them measure nothing."""

    def after_report(
        self,
        run_context: Any,
        metrics: list[dict[str, Any]],
        checkpoint: ray.train.Checkpoint | None,
    ) -> None:
        """Tell Tune the first worker's metrics, where an epoch has ended."""
        if EPOCH in metrics[0]:
            super().after_report(run_context, metrics, checkpoint)


def run_trial(config: Mapping[str, Any], *, known: Known) -> None:
    """Train one setting, or tell again what an earlier start of the sweep found."""
    number = number_of(config)
    entry = known.entries.get(number)
    if entry is not None:
        tell_again(entry, metrics=known.sweep.search.metrics)
        return
    address = ray.get_runtime_context().gcs_address
    trainer = cast(ActorClass, ray.remote(num_cpus=0)(Trainer)).options(
        runtime_env={"env_vars": {"RAY_ADDRESS": address}}
    )
    trainer = trainer.remote()
    try:
        last = ray.get(
            trainer.train.remote(
                change_fields(known.sweep.run, setting_of(config)),
                name=known.sweep.trial_name(number),
                tracking_uri=known.tracking_uri,
                tags=child_tags(known.sweep.name, parent_id=known.sweep.mlflow_run_id),
                callback=ReportEpochs(),
            )
        )
    except RayError as error:
        end = bad_end(error, metrics=known.sweep.search.metrics)
        tune.report(end)
        if end[OUTCOME] == "failed":
            raise  # Tune tries again
        return
    if last is not None:
        tune.report(last)


def tell_again(entry: Entry, *, metrics: Sequence[str]) -> None:
    """Report what is known: so scheduler and searcher are where they were."""
    for report in entry.reports:
        tune.report(dict(report))
    if entry.status in ("diverged", "refused"):
        end = {OUTCOME: entry.status, REASON: entry.reason}
        tune.report(_no_values(metrics) | end)


def bad_end(error: BaseException, *, metrics: Sequence[str]) -> dict[str, Any]:
    """Make the last report of a trial that has failed, diverged or was refused."""
    outcome, reason = "failed", f"{type(error).__name__}: {first_line(error)}"
    for cause in causes(error):
        if isinstance(cause, ValueError):
            outcome, reason = "refused", first_line(cause)
            if isinstance(cause, NonFiniteLossError):
                outcome = "diverged"
            break
        if isinstance(cause, RunFailedError):
            reason = first_line(cause)
    return _no_values(metrics) | {OUTCOME: outcome, REASON: reason}


def _no_values(metrics: Sequence[str]) -> dict[str, float]:
    # Before any epoch, so that asha compares it nowhere.
    return dict.fromkeys(metrics, math.nan) | {EPOCH: 0}


class Trainer:
    """Train beside Tune's process, and end with it."""

    def train(
        self,
        run: Run,
        *,
        name: str,
        tracking_uri: str,
        tags: Mapping[str, str],
        callback: ReportEpochs,
    ) -> dict[str, Any] | None:
        """Train a new run, or go on with it; give the last metrics of the latter.

        They may have been reported just when the sweep was killed.
        """
        from pipelines.train import fit

        record = find_record(run.storage, name=name)
        result = fit(
            run if record is None else record.run,
            name=name,
            record=record,
            callbacks=[callback],
            tracking_uri=tracking_uri,
            tags=tags,
            keep_model=False,
        )
        return None if record is None else result.metrics
