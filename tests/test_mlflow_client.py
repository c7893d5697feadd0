"""An MLflow store is reached soon or not at all, and points wait until it is back."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run as MlflowRun

from pipelines import tracking
from pipelines.driver.fit import fit
from pipelines.tracking.client import PATIENCE, attempt, environment
from tests.fault_runs import At, brief_run
from tests.waiting import wait_for

CLOSE_S = 120.0


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Share one store among all tests: creating one takes seconds."""
    return tmp_path_factory.mktemp("storage")


@pytest.fixture
def uri(storage: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return tracking.default_uri(str(storage))


def _open(uri: str, *, run_id: str = "", **params: object) -> str:
    return tracking.open_run(
        uri, experiment="tests", name="a", params=params, tags={}, run_id=run_id
    )


def _history(uri: str, run_id: str, name: str) -> list[tuple[int, float]]:
    points = MlflowClient(uri).get_metric_history(run_id, name)
    return [(point.step, point.value) for point in points]


def test_the_store_lies_in_the_storage_folder_unless_the_environment_names_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    expected = f"sqlite:///{tmp_path}/runs/mlflow.db"
    assert tracking.default_uri("runs") == expected
    assert tracking.default_uri(f"file://{tmp_path}/runs") == expected
    with pytest.raises(ValueError, match="MLFLOW_TRACKING_URI"):
        tracking.default_uri("s3://bucket/runs")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://server")
    assert tracking.default_uri("s3://bucket/runs") == "http://server"


def test_a_server_that_is_away_is_told_once_and_changes_nothing(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "9")
    away = f"http://me:word@127.0.0.1:{_free_port()}"
    assert _open(away, lr=1) == ""
    warnings = [r for r in caplog.records if r.name == "pipelines.tracking.client"]
    assert len(warnings) == 1
    assert "this training has no run" in warnings[0].getMessage()
    assert "word" not in warnings[0].getMessage()
    assert _open(away, run_id="a" * 32) == "a" * 32, "its metrics can still be written"
    tracking.end_run(away, "a" * 32, status="FINISHED")
    none = Path("none")
    assert tracking.log_model(away, "a" * 32, checkpoint=none, example=b"") == ""
    writer = tracking.MetricWriter(away, "a" * 32)
    writer.log({"loss": 1.0, "top1": 2.0}, step=0)
    assert writer.close(0.2) == 2

    def is_as_before() -> bool:
        tries = os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"]
        return tries == "9" and "MLFLOW_HTTP_REQUEST_TIMEOUT" not in os.environ

    # The writer's thread, left behind, may still be within its last try.
    wait_for(is_as_before, what="MLflow's settings of before")


def test_settings_of_threads_that_overlap_are_restored(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LEFT", "before")
    first, second = environment({"LEFT": "in"}), environment({"LEFT": "in"})
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    second.__exit__(None, None, None)
    assert os.environ["LEFT"] == "before"


def test_a_call_that_never_answers_is_left_behind(
    caplog: pytest.LogCaptureFixture,
) -> None:
    answer, limits = threading.Event(), []

    def call(client: MlflowClient) -> str:
        limits.append(os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"])
        answer.wait()
        return "too late"

    away = f"http://127.0.0.1:{_free_port()}"
    got = attempt(call, uri=away, otherwise="", loss="x is lost", timeout_s=2)
    answer.set()
    assert got == ""
    assert limits == [PATIENCE["MLFLOW_HTTP_REQUEST_TIMEOUT"]]
    assert "no answer in 2 s" in caplog.text


def test_a_store_that_cannot_be_written_is_away(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    assert _open(f"sqlite:///{tmp_path}/file/mlflow.db") == ""
    (tmp_path / "mlflow.db").write_text("this is no database, by any measure " * 9)
    assert _open(f"sqlite:///{tmp_path}/mlflow.db") == ""
    assert caplog.text.count("this training has no run") == 2


def test_a_worker_without_the_drivers_file_creates_none(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    writer = tracking.MetricWriter(f"sqlite:///{tmp_path}/mlflow.db", "a" * 32)
    writer.log({"loss": 1.0}, step=0)
    assert writer.close(1.0) == 1
    assert "shared storage folder" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_points_wait_while_the_store_is_locked(
    uri: str, caplog: pytest.LogCaptureFixture
) -> None:
    run_id = _open(uri)
    holder = sqlite3.connect(uri.removeprefix("sqlite:///"))
    holder.execute("BEGIN EXCLUSIVE")
    writer = tracking.MetricWriter(uri, run_id)
    writer.log({"loss": 1.0}, step=0)
    _wait_for(lambda: "takes no metrics" in caplog.text)
    writer.log({"loss": 0.5}, step=1)
    holder.rollback()
    holder.close()
    assert writer.close(CLOSE_S) == 0
    assert _history(uri, run_id, "loss") == [(0, 1.0), (1, 0.5)]
    assert "takes metrics again" in caplog.text


def test_two_drivers_create_one_store(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    # Forked, since each import of MLflow would take seconds.
    with multiprocessing.get_context("fork").Pool(2) as drivers:
        ids = set(drivers.map(_open, [uri, uri], chunksize=1))
    experiment = MlflowClient(uri).get_experiment_by_name("tests")
    assert experiment is not None
    runs = MlflowClient(uri).search_runs([experiment.experiment_id])
    assert {run.info.run_id for run in runs} == ids
    assert len(ids) == 2


def test_a_run_goes_on_while_a_server_is_killed_and_started_again(
    uri: str,
    storage: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Every point comes, once, also of the steps in which nobody took them."""
    port = _free_port()
    server_uri = f"http://127.0.0.1:{port}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server_uri)
    first, again = _server(storage, port=port), _server(storage, port=port)
    first.__enter__()

    def kill() -> None:
        first.__exit__(None, None, None)

    def start() -> None:
        # Training has gone on, with a report for each checkpoint of that while.
        assert "step 15/20" in capsys.readouterr().out
        _wait_for(lambda: "takes no metrics" in caplog.text)
        again.__enter__()

    try:
        run = brief_run(tmp_path, num_epochs=2)
        callback = At({2: kill, 5: start})
        fit(run, name="outlived", callbacks=[callback], keep_model=False)
        (found,) = _runs_named(server_uri, "outlived")
        run_id = found.info.run_id
        tracking.log_text(server_uri, run_id, text="hello", path="a.txt")
        artifacts = MlflowClient(server_uri).list_artifacts(run_id)
    finally:
        again.__exit__(None, None, None)
    assert [artifact.path for artifact in artifacts] == ["a.txt"]
    for name, steps in (("train/loss", [5, 10, 15, 20]), ("val/top1", [0, 20])):
        assert [step for step, _ in _history(uri, run_id, name)] == steps
    assert MlflowClient(uri).get_run(run_id).info.status == "FINISHED"


def _runs_named(uri: str, name: str) -> list[MlflowRun]:
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("sovit")
    assert experiment is not None
    found = client.search_runs([experiment.experiment_id])
    return [run for run in found if run.info.run_name == name]


def _wait_for(holds: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + CLOSE_S
    while not holds():
        assert time.monotonic() < deadline_s, "waited in vain"
        time.sleep(0.05)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def _server(storage: Path, *, port: int) -> Iterator[None]:
    command = [sys.executable, "-m", "mlflow", "server", "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{storage}/mlflow.db"]
    command += ["--artifacts-destination", str(storage / "served")]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    settings = {
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    server = subprocess.Popen(
        command,
        env={**os.environ, **settings},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        _wait_for(lambda: _is_up(port))
        yield
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def _is_up(port: int) -> bool:
    try:
        return urllib.request.urlopen(f"http://127.0.0.1:{port}/health").status == 200
    except OSError:
        return False
