"""Runs are read back from MLflow, or one line says why not."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlflow import MlflowClient

from pipelines import tracking
from pipelines.tracking.query import MetricPoint, RunStore, last_life
from pipelines.tracking.sweeps import KIND_TAG, PARENT_TAG, SWEEP_KIND
from tests.stored_runs import keep_run, log_epochs

# One process makes the store: MLflow takes seconds for it.

ODD_NAME = """it's "odd" <script>alert('1')</script>"""


@dataclass(frozen=True, kw_only=True)
class Kept:
    """Hold a store's address and the ids of its runs."""

    uri: str
    ids: dict[str, str]


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Kept:
    uri = tracking.default_uri(str(tmp_path_factory.mktemp("storage")))
    ids = {
        "first": keep_run(uri, "twice", top1=(1.0,)),
        "second": keep_run(uri, "twice", top1=(2.0,)),
        "odd": keep_run(uri, ODD_NAME),
        "quote": keep_run(uri, "it's"),
        "running": keep_run(uri, "running", status=""),
        "empty": keep_run(uri, "empty", tags={KIND_TAG: SWEEP_KIND}),
        "sweep": keep_run(uri, "sweep", tags={KIND_TAG: SWEEP_KIND}),
        "gone": keep_run(uri, "gone"),
        "lost": keep_run(uri, "lost", experiment="deleted"),
    }
    for at in range(3):
        name = f"trial-{at}"
        ids[name] = keep_run(uri, name, tags={PARENT_TAG: ids["sweep"]})
    client = MlflowClient(uri)
    client.delete_run(ids["gone"])
    experiment = client.get_experiment_by_name("deleted")
    assert experiment is not None
    client.delete_experiment(experiment.experiment_id)
    return Kept(uri=uri, ids=ids)


@pytest.fixture
def store(kept: Kept) -> RunStore:
    return RunStore(kept.uri)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("running", ["running"]),
        (ODD_NAME, ["odd"]),
        ("it's", ["quote"]),
        ("sweep", ["trial-0", "trial-1", "trial-2"]),
    ],
)
def test_a_name_finds_a_run_or_a_sweeps_trials(
    kept: Kept, store: RunStore, name: str, expected: list[str]
) -> None:
    assert [run.run_id for run in store.find([name])] == [
        kept.ids[key] for key in expected
    ]


def test_ids_and_their_beginnings_find_runs_each_once(
    kept: Kept, store: RunStore
) -> None:
    first = kept.ids["first"]
    names = [first, first[:12], kept.ids["trial-1"], "sweep"]
    found = [run.name for run in store.find(names)]
    assert found == ["twice", "trial-1", "trial-0", "trial-2"]


def test_an_experiment_gives_all_runs_but_the_sweeps_own(
    kept: Kept, store: RunStore
) -> None:
    found = {run.run_id for run in store.find(["experiment:tests"])}
    left_out = {"empty", "sweep", "gone", "lost"}
    assert found == {id_ for key, id_ in kept.ids.items() if key not in left_out}


def test_of_two_runs_with_one_name_the_newest_is_taken_and_said(
    kept: Kept, store: RunStore, caplog: pytest.LogCaptureFixture
) -> None:
    (run,) = store.find(["twice"])
    assert run.run_id == kept.ids["second"]
    assert kept.ids["first"][:8] in caplog.text


def test_a_run_holds_what_was_kept(kept: Kept, store: RunStore) -> None:
    (run,) = store.find([kept.ids["second"]])
    assert (run.name, run.status) == ("twice", "FINISHED")
    assert run.params["pooling.power"] == "0.5"
    assert run.metrics["val/top1"] == 2.0
    assert run.end_s is not None
    assert run.start_s < run.end_s
    (running,) = store.find(["running"])
    assert running.end_s is None
    assert store.history(running.run_id, metric="val/top1") == ()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("trail-1", "got 'trail-1'; there are trial-1"),
        ("0000", "got '0000'"),
        ("lost", "got 'lost'"),
        ("gone", "got 'gone'"),
        ("empty", "expected trials of the sweep 'empty', got none"),
        ("experiment:deleted", "which is deleted; restore it with mlflow experiments"),
        ("experiment:test", "there are tests"),
        ("experiment:Default", "expected runs of the experiment 'Default', got none"),
    ],
)
def test_what_is_not_there_is_said_in_a_line(
    store: RunStore, name: str, said: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(said)) as raised:
        store.find([name])
    assert "\n" not in str(raised.value)


def test_a_deleted_run_is_called_so(kept: Kept, store: RunStore) -> None:
    with pytest.raises(ValueError, match="mlflow runs restore --run-id"):
        store.find([kept.ids["gone"]])


@pytest.mark.parametrize("content", [None, "", "no database " * 99])
def test_no_store_is_made(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "mlflow.db"
    if content is not None:
        path.write_text(content)
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="expected an MLflow store"):
        RunStore(f"sqlite:///{path}")
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before
    with pytest.raises(ValueError, match="no folder"):
        RunStore(f"file://{tmp_path}/mlruns")
    with pytest.raises(ValueError, match="expected the address of an MLflow store"):
        RunStore(str(tmp_path / "mlruns"))
    assert not (tmp_path / "mlruns").exists()


def test_a_server_that_is_away_is_said_without_its_password() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with pytest.raises(ValueError, match="expected an answer of MLflow") as raised:
        RunStore(f"http://me:word@127.0.0.1:{port}")
    assert "word" not in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_history_is_that_of_the_last_life(kept: Kept, store: RunStore) -> None:
    run_id = keep_run(kept.uri, "restarted", top1=(1.0, 2.0, 3.0), status="")
    log_epochs(kept.uri, run_id, top1=(7.0, float("inf")), first_epoch=2)
    found = store.history(run_id, metric="val/top1")
    points = [(point.step, point.value) for point in found]
    assert points == [(10, 1.0), (20, 7.0), (30, float("inf"))]


@st.composite
def lives(draw: st.DrawFn) -> list[list[int]]:
    """Draw the steps that each life of a run logs: each goes on within the last."""
    steps: list[list[int]] = [list(range(draw(st.integers(1, 9))))]
    for _ in range(draw(st.integers(0, 3))):
        start = draw(st.integers(0, steps[-1][-1] + 1))
        steps.append(list(range(start, start + draw(st.integers(1, 9)))))
    return steps


@given(lives())
def test_each_step_comes_once_and_from_the_last_life_that_had_it(
    steps: list[list[int]],
) -> None:
    points = [
        MetricPoint(step, float(life), time_s=float(100 * life + at))
        for life, of_life in enumerate(steps)
        for at, step in enumerate(of_life)
    ]
    found = last_life(iter(reversed(points)))
    assert [point.step for point in found] == list(range(steps[-1][-1] + 1))
    last = [point for point in points if point.value == len(steps) - 1]
    assert list(found[-len(last) :]) == last


@pytest.fixture(autouse=True)
def _nothing_in_the_working_directory(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("here")
    monkeypatch.chdir(folder)
    yield
    assert list(folder.iterdir()) == []
