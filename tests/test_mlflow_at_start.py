"""What MLflow may be when a training begins: refused, or waited for and caught up."""

from __future__ import annotations

import http.server
import multiprocessing
import os
import shutil
import signal
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run as MlflowRun
from ray.train import UserCallback

from pipelines import tracking
from pipelines.checkpoints.run_record import read_record
from pipelines.config import Run
from pipelines.driver import mlflow_run
from pipelines.driver.fit import fit
from pipelines.errors import RunFailedError
from pipelines.tracking import LateRun, MetricWriter, late_run, sqlite_file, usable
from pipelines.tracking.client import connect, sqlite_path
from tests.fault_runs import brief_run
from tests.mlflow_stores import prepare_store
from tests.waiting import wait_for

CLOSE_S = 60.0


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait less for locks, names and the next try than a training would."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(sqlite_file, "BUSY_TIMEOUT_S", 0.05)
    monkeypatch.setattr(usable, "_NAME_PATIENCE_S", 0.0)
    monkeypatch.setattr(late_run, "_FIRST_RETRY_S", 0.1)
    monkeypatch.setattr(late_run, "_LAST_RETRY_S", 0.2)


@pytest.fixture
def uri(tmp_path: Path) -> str:
    return prepare_store(str(tmp_path / "runs"))


def file_of(uri: str) -> Path:
    path = sqlite_path(uri)
    assert path is not None
    return path


@contextmanager
def locked(uri: str) -> Iterator[Callable[[], None]]:
    """Lock a database; give what frees it."""
    holder = sqlite3.connect(
        file_of(uri), isolation_level=None, check_same_thread=False
    )
    holder.execute("BEGIN EXCLUSIVE")
    with closing(holder):
        yield holder.rollback


def _change(uri: str, *statements: str) -> None:
    with closing(sqlite3.connect(file_of(uri))) as connection:
        for statement in statements:
            connection.execute(statement)
        connection.commit()


def _delete_experiment(uri: str) -> None:
    client = MlflowClient(uri)
    client.delete_experiment(client.create_experiment("sovit"))


def _spoil_pages(uri: str) -> None:
    content = bytearray(file_of(uri).read_bytes())
    content[8192:20480] = bytes(12288)
    file_of(uri).write_bytes(content)


DAMAGES: dict[str, tuple[Callable[[str], Any], str]] = {
    "deleted experiment": (_delete_experiment, "mlflow experiments restore -x"),
    "another version": (
        lambda uri: _change(uri, "update alembic_version set version_num='451aebb31d'"),
        "run `mlflow db upgrade ADDRESS`; if a later one did, install that",
    ),
    "no database": (lambda uri: file_of(uri).write_text("nothing" * 99), "is damaged"),
    "damaged pages": (_spoil_pages, "is damaged: put a copy back, or move it away"),
    "cut off in its making": (
        lambda uri: _change(
            uri, "drop table registered_models", "drop table alembic_version"
        ),
        "its making was cut off",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_store_that_only_the_user_can_mend_is_refused(uri: str, damage: str) -> None:
    spoil, said = DAMAGES[damage]
    spoil(uri)
    with pytest.raises(ValueError, match=r".") as caught:
        tracking.check_usable(uri, experiment="sovit")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("{folder}/mlruns", "no longer writes to folders of files"),
        ("file://{folder}/mlruns", "no longer writes to folders of files"),
        ("127.0.0.1:5000", "no longer writes to folders of files"),
        ("sqlite://runs/mlflow.db", "set MLFLOW_TRACKING_URI to http://HOST:PORT or"),
        ("sqlite:///{folder}/file/mlflow.db", "let this user write there"),
        ("htp://127.0.0.1:5000", "set MLFLOW_TRACKING_URI to http://HOST:PORT or"),
        ("http://127.0.0.1:99999", "set MLFLOW_TRACKING_URI to http://HOST:PORT or"),
        ("http://me:word@no-such.invalid:5000", "mend the server's name"),
        ("mysql+nodriver://127.0.0.1/x", "set MLFLOW_TRACKING_URI to http://HOST:PORT"),
    ],
)
def test_an_address_with_a_mistake_in_it_is_refused(
    tmp_path: Path, address: str, said: str
) -> None:
    (tmp_path / "file").touch()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=r".") as caught:
        tracking.check_usable(address.format(folder=tmp_path), experiment="sovit")
    assert said in str(caught.value)
    assert "word" not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


class _Busy(http.server.BaseHTTPRequestHandler):
    """Answer as a server does that is starting."""

    def do_GET(self) -> None:
        """Say so."""
        self.send_error(503)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing here."""


def test_what_passes_is_warned_of(
    uri: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server = http.server.HTTPServer(("127.0.0.1", 0), _Busy)
    address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    tracking.check_usable(address, experiment="sovit")
    server.shutdown()
    server.server_close()  # from now on connections are refused
    tracking.check_usable(address, experiment="sovit")
    with locked(uri):
        tracking.check_usable(uri, experiment="sovit")
    assert caplog.text.count("its run is opened once it is back") == 3
    tracking.check_usable(uri, experiment="sovit")
    tracking.check_usable(f"sqlite:///{tmp_path}/new/mlflow.db", experiment="sovit")
    assert caplog.text.count("its run is opened once it is back") == 3
    assert not (tmp_path / "new").exists()


def late_run_of(uri: str, **settings: Any) -> LateRun:
    run = {"experiment": "sovit", "name": "a", "place": "a", "id": "1" * 32}
    run |= {"run_id": "", "is_begun": False} | settings
    return LateRun(uri, params={"lr": 1}, tags={"where": "here"}, run=run)


def run_in(uri: str) -> MlflowRun:
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("sovit")
    assert experiment is not None
    (found,) = client.search_runs([experiment.experiment_id])
    return found


def history(uri: str, key: str) -> list[int]:
    points = MlflowClient(uri).get_metric_history(run_in(uri).info.run_id, key)
    return [point.step for point in points]


def test_a_run_is_opened_late_with_all_that_waited_for_it(uri: str) -> None:
    """Once as a new one, and once as one that goes on."""
    for life in range(2):
        with locked(uri) as free:
            run = late_run_of(uri, is_begun=life > 0)
            run.open(is_demanded=True)
            writer = MetricWriter(uri, run.needed_id)
            for step in range(3):
                writer.log({"loss": 1.0}, step=3 * life + step)
            run.do(lambda id: tracking.tag_run(uri, id, tags={"later": "1"}))
            run.do(lambda id: tracking.tag_run(uri, id, tags={"later": "2"}))
            assert not run.wait(0.3)
            assert run.run_id == ""
            free()
        assert run.wait(CLOSE_S)
        assert writer.close(CLOSE_S) == 0
        run.end(status="FINISHED")
    found = run_in(uri)
    assert found.data.params == {"lr": "1"}
    assert (found.data.tags["where"], found.data.tags["later"]) == ("here", "2")
    assert found.data.tags["num_restarts"] == "1"
    assert found.info.status == "FINISHED"
    assert history(uri, "loss") == [0, 1, 2, 3, 4, 5]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = brief_run(tmp_path_factory.mktemp("start"), num_epochs=1)
    prepare_store(run.storage)
    return run


class _Freed(UserCallback):
    """Free what is locked when a first report comes."""

    def __init__(self, free: Callable[[], None]) -> None:
        self._free = free

    def after_report(self, run_context: Any, metrics: Any, checkpoint: Any) -> None:
        """Free it, once."""
        self._free()
        self._free = lambda: None


def _named(uri: str, name: str) -> tuple[MlflowRun, list[int]]:
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("sovit")
    assert experiment is not None
    (found,) = client.search_runs(
        [experiment.experiment_id], f"attributes.run_name = '{name}'"
    )
    points = client.get_metric_history(found.info.run_id, "train/loss")
    return found, [point.step for point in points]


def test_a_training_catches_up_whenever_mlflow_comes(
    base: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it trains, or only once it is gone on with after its end."""
    uri = tracking.default_uri(base.storage)
    with locked(uri) as free:
        fit(base, name="while", callbacks=[_Freed(free)], keep_model=False)
    found, steps = _named(uri, "while")
    assert found.info.status == "FINISHED"
    assert found.data.params["optim.num_epochs"] == "1"
    assert found.data.tags["data.train.num_rows"] == "301"
    assert "hardware.precision" in found.data.tags
    assert steps == [5, 10]

    monkeypatch.setattr(mlflow_run, "_OPEN_PATIENCE_S", 0.2)
    monkeypatch.setattr(mlflow_run, "_FLUSH_S", 0.2)
    monkeypatch.setattr(late_run, "_END_PATIENCE_S", 0.2)
    with (
        locked(uri),
        pytest.raises(RunFailedError, match=r"away all along.*--resume after"),
    ):
        fit(base, name="after", keep_model=False)
    monkeypatch.setattr(mlflow_run, "_FLUSH_S", 15.0)
    unsent = Path(base.storage, "after/unsent.json")
    assert unsent.exists()
    record = read_record(base.storage, name="after")
    fit(record.run, name="after", record=record, keep_model=False)
    found, steps = _named(uri, "after")
    assert found.info.status == "FINISHED"
    assert steps == [5, 10]
    assert not unsent.exists()


def test_a_training_is_refused_before_anything_is_there(
    base: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where only opening the run shows that it can't be."""
    uri = tracking.default_uri(base.storage)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", str(tmp_path / "mlruns"))
    with pytest.raises(ValueError, match="folders of files"):
        fit(base, name="refused")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setattr(tracking, "check_usable", lambda *a, **settings: None)
    moved = tmp_path / "mlflow.db"
    shutil.copy(file_of(uri), moved)
    _change(f"sqlite:///{moved}", "update alembic_version set version_num='451aebb'")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{moved}")
    with pytest.raises(ValueError, match="mlflow db upgrade"):
        fit(base, name="refused")
    assert not Path(base.storage, "refused").exists()


class _CutOff:
    """Stand for MLflow's client, and die in the middle of making tables."""

    def __init__(self, tracking_uri: str) -> None:
        with closing(sqlite3.connect(file_of(tracking_uri))) as connection:
            connection.execute("create table experiments (experiment_id integer)")
        os.kill(os.getpid(), signal.SIGKILL)


def _make_until_killed(uri: str) -> None:
    mlflow.MlflowClient = _CutOff  # pyright: ignore
    connect(uri, create=True)


def test_a_kill_while_a_store_is_made_leaves_none(tmp_path: Path) -> None:
    uri = tracking.default_uri(str(tmp_path / "runs"))
    fork = multiprocessing.get_context("fork")
    maker = fork.Process(target=_make_until_killed, args=(uri,))
    maker.start()
    maker.join()
    assert maker.exitcode == -signal.SIGKILL
    path = file_of(uri)
    assert not path.exists()
    assert len(list(path.parent.glob("*.partial*"))) == 1
    with sqlite_file.put_in_place(path) as partial:
        partial.write_text("mine")
        path.write_text("theirs")
    assert [file.name for file in path.parent.iterdir() if file.suffix != ".lock"] == [
        "mlflow.db"
    ]
    assert path.read_text() == "theirs"


def test_a_store_is_made_under_another_name_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri, made = tracking.default_uri(str(tmp_path)), list[str]()
    source = file_of(prepare_store(str(tmp_path / "source")))

    def make(tracking_uri: str) -> None:
        made.append(tracking_uri)
        if not file_of(tracking_uri).exists():
            shutil.copy(source, file_of(tracking_uri))

    monkeypatch.setattr(mlflow, "MlflowClient", make)
    connect(uri, create=True)
    assert made[0].startswith(f"{uri}.")
    assert made[1:] == [uri]
    assert file_of(uri).read_bytes() == source.read_bytes()
    wait_for(lambda: not list(tmp_path.glob("*.partial")), what="no rest")
