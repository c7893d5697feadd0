"""A sweep that a signal ends is said to be so in MLflow, with the trials that ran."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
from mlflow import MlflowClient

from pipelines import tracking
from pipelines.checkpoints.run_record import new_record, write_record
from pipelines.driver.signals import stop_requests
from pipelines.errors import InterruptedRun
from tests.mlflow_stores import prepare_store
from tests.test_sweep_ledger import a_sweep
from tuning.sweep import _Carried, _ended_early
from tuning.trials.ledger import Ledger, TrialRecord, write_sweep


def opened(uri: str, name: str) -> str:
    return tracking.open_run(uri, experiment="sovit", name=name, params={}, tags={})


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        (KeyboardInterrupt(), KeyboardInterrupt, "--resume searched"),
        (
            InterruptedRun("ended by SIGHUP", status=129),
            InterruptedRun,
            r"ended by SIGHUP; go on with (\S*/)?sovit-tune --resume searched",
        ),
    ],
)
def test_what_ran_is_killed_in_mlflow_and_what_had_ended_is_not(
    error: BaseException, kind: type[BaseException], said: str, tmp_path: Path
) -> None:
    uri = prepare_store(str(tmp_path))
    sweep = dataclasses.replace(
        a_sweep(tmp_path), id="a", mlflow_run_id=opened(uri, "searched")
    )
    write_sweep(sweep)
    ledger = Ledger(sweep, stage="full")
    statuses = ("running", "finished", "waiting", "running")
    runs: dict[int, str] = {}
    for number, status in enumerate(statuses):
        ledger.put(TrialRecord(number=number, setting={}, status=status))
        if status == "waiting":
            continue
        name = sweep.trial_name(number)
        # The last one is a run of another, under the name of a trial of this sweep.
        owner = "a" if number < 3 else "another"
        record = new_record(sweep.run, name=name, sweep_id=owner)
        runs[number] = opened(uri, name)
        write_record(dataclasses.replace(record, mlflow_run_id=runs[number]))
    tracking.end_run(uri, runs[1], status="FINISHED")
    carried = _Carried(
        sweep=sweep,
        space={},
        uri=uri,
        num_concurrent=1,
        retries_failed=False,
    )
    with (
        pytest.raises(kind) as caught,
        stop_requests() as stop,
        _ended_early(carried, stop=stop),
    ):
        raise error
    assert re.search(said, str(caught.value))
    client = MlflowClient(uri)
    ended = {run: client.get_run(run).info.status for run in runs.values()}
    assert [ended[runs[number]] for number in runs] == ["KILLED", "FINISHED", "RUNNING"]
    parent = client.get_run(sweep.mlflow_run_id)
    assert parent.info.status == "KILLED"
    assert "interrupted" in parent.data.tags["failure_reason"]
