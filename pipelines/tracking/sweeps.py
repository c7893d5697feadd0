"""Record a sweep in MLflow: a parent run, and a child run for each trial.

A training goes on where MLflow is away. A sweep is there to be compared, so it asks for
MLflow before it begins, and fails in one line where the store or the experiment can't
be used; once its trials run, nothing of MLflow stops them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

from pipelines.storage.redaction import error_summary, without_credentials
from pipelines.tracking.client import (
    ADDRESS_VARIABLE,
    PATIENCE,
    attempt,
    connect,
    environment,
)
from pipelines.tracking.entries import (
    active_run,
    create_run,
    log_params,
    log_tags,
    placed_run,
    reopen_run,
)
from pipelines.tracking.sweep_view import view_state
from pipelines.tracking.usable import check_experiment, refuse_unless_passing

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

T = TypeVar("T")
PARENT_TAG = "mlflow.parentRunId"
KIND_TAG, SWEEP_KIND = "sovit.kind", "sweep"
SWEEP_TAG, OUTCOME_TAG = "sovit.sweep", "sovit.outcome"
# MLflow's compare page shows the first three params that differ, by name: this one
# comes after those of a pooling, which often change it.
NUM_PARAMS = "total_params"


def open_sweep(
    uri: str,
    *,
    experiment: str,
    name: str,
    params: Mapping[str, object],
    tags: Mapping[str, str],
    run_id: str = "",
    id: str = "",
) -> str:
    """Create a sweep's run, or reopen it; return its id.

    Raises ValueError where MLflow does not answer, where the experiment is deleted, and
    where a sweep's earlier run is no longer there.
    """

    def open_it(client: MlflowClient) -> str:
        check_experiment(client, name=experiment)
        if run_id:
            run = _old_run(client, run_id=run_id, uri=uri)
            reopen_run(client, run=run)
        else:
            run = create_run(
                client, uri=uri, experiment=experiment, name=name, place=name, id=id
            )
        log_params(client, run=run, params=params)
        kind = {KIND_TAG: SWEEP_KIND, SWEEP_TAG: name}
        log_tags(client, run_id=run.info.run_id, tags={**tags, **kind})
        return run.info.run_id

    return _demanded(open_it, uri=uri)


def child_tags(sweep: str, *, parent_id: str) -> dict[str, str]:
    """Return the tags by which MLflow shows a trial's run below its sweep."""
    return {SWEEP_TAG: sweep, PARENT_TAG: parent_id}


def log_child(
    uri: str,
    *,
    experiment: str,
    name: str,
    params: Mapping[str, object],
    tags: Mapping[str, str],
    reports: Sequence[Mapping[str, float]],
    step: str = "epoch",
) -> str:
    """Record a whole trial in one call; return its run's id, "" if MLflow is away.

    Each report's `step` is its place on the charts' axis.
    """

    def log(client: MlflowClient) -> str:
        from mlflow.entities import Metric

        place = f"{tags[PARENT_TAG]}/{name}"
        # Who recorded it may have been killed before noting its id.
        run = placed_run(client, experiment=experiment, name=name, place=place)
        if run is None:
            run = create_run(
                client, uri=uri, experiment=experiment, name=name, place=place
            )
        run_id = run.info.run_id
        log_params(client, run=run, params=params)
        log_tags(client, run_id=run_id, tags=tags)
        now_ms = run.info.start_time
        metrics = [
            Metric(key, value, now_ms, round(report[step]))
            for report in reports
            for key, value in report.items()
        ]
        client.log_batch(run_id, metrics=metrics, synchronous=True)
        return run_id

    return attempt(log, uri=uri, otherwise="", loss=f"{name} is not recorded")


def save_view(
    uri: str,
    *,
    sweep: str,
    run_id: str,
    experiment: str,
    fields: Sequence[str],
    metric: str,
) -> str:
    """Save a view of a sweep's trials on its experiment; return its path.

    MLflow's page shows it below the server's address: parallel coordinates of all
    searched fields and the metric, and a scatter plot for each field. The page's own
    compare view has the first three fields by name. The format of views is not
    documented; this is MLflow 3.17's. The sweep's run gets a link to it as its note.
    """

    def save(client: MlflowClient) -> str:
        found = client.get_experiment_by_name(experiment)
        assert found is not None
        now_ms = int(time.time() * 1000)
        view = {"name": sweep, "createdAt": now_ms, "updatedAt": now_ms}
        state = view_state(run_id, fields=fields, metric=metric)
        client.set_experiment_tag(
            found.experiment_id,
            f"mlflow.sharedViewState.{run_id}",
            json.dumps({**view, "state": json.dumps(state)}),
        )
        path = (
            f"#/experiments/{found.experiment_id}/runs?viewStateShareKey={run_id}"
            "&compareRunsMode=CHART"
        )
        note = f"[Parallel coordinates and scatter plots of the trials]({path})"
        client.set_tag(run_id, "mlflow.note.content", note)
        return path

    return attempt(save, uri=uri, otherwise="", loss="the sweep has no view")


def log_metrics(uri: str, run_id: str, *, metrics: Mapping[str, float]) -> None:
    """Log metrics of a run that has no steps."""

    def log(client: MlflowClient) -> None:
        for name, value in metrics.items():
            client.log_metric(run_id, name, value)

    if run_id:
        attempt(log, uri=uri, otherwise=None, loss="some metrics are missing")


def _demanded(call: Callable[[MlflowClient], T], *, uri: str) -> T:
    """Call with a client, converting errors into a one-line ValueError."""
    try:
        with environment(PATIENCE):
            return call(connect(uri, create=True))
    except ValueError:
        raise
    except Exception as error:  # MLflow lets requests', SQLAlchemy's and others through
        refuse_unless_passing(error, uri=uri)
        raise ValueError(
            f"expected MLflow at {without_credentials(uri)} to keep the sweep in, got "
            f"{error_summary(error)}; start it, or set {ADDRESS_VARIABLE} to another"
        ) from error


def _old_run(client: MlflowClient, *, run_id: str, uri: str) -> Run:
    run = active_run(client, run_id=run_id)
    if run is None:
        raise ValueError(
            f"expected the sweep's run {run_id} in MLflow at "
            f"{without_credentials(uri)}, got a store without it; put the store back, "
            f"set {ADDRESS_VARIABLE} to where it is, or begin a new sweep"
        )
    return run
