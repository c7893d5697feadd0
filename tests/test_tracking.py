"""A training is one MLflow run, and goes on where MLflow is away."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run as MlflowRun

from pipelines import tracking
from pipelines.config import Data, Model, Optim, Run
from pipelines.config.serialization import flat_params
from pipelines.tracking.sweeps import PARENT_TAG, log_child
from sovit import Pooling

CLOSE_S = 120.0


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Share one store among all tests: creating one takes seconds."""
    return tmp_path_factory.mktemp("storage")


@pytest.fixture
def uri(
    storage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    yield tracking.default_uri(str(storage))
    assert list(tmp_path.iterdir()) == [], "nothing belongs in the working directory"


def _open(uri: str, *, run_id: str = "", **params: object) -> str:
    return tracking.open_run(
        uri, experiment="tests", name="a", params=params, tags={}, run_id=run_id
    )


def _read(uri: str, run_id: str) -> MlflowRun:
    return MlflowClient(uri).get_run(run_id)


def _history(uri: str, run_id: str, name: str) -> list[tuple[int, float]]:
    points = MlflowClient(uri).get_metric_history(run_id, name)
    return [(point.step, point.value) for point in points]


def test_a_run_holds_flat_params_and_tags_beside_its_store(
    uri: str, storage: Path
) -> None:
    run = Run(
        recipe="imagenet.so_vit_7",
        model=Model(name="so_vit_7", pooling=Pooling(power=0.4)),
        data=Data(train="s3://key:se/cret@bucket/t", val="v", batch_size=8),
        optim=Optim(lr=1e-3, num_epochs=5),
    )
    many = {f"extra.{index}": index for index in range(150)}
    run_id = tracking.open_run(
        uri,
        experiment="flat",
        name="one",
        params={**flat_params(run), **many, "long": "x" * 900},
        tags={"where": "https://me:word@host/x"},
    )
    tracking.log_text(uri, run_id, text="from s3://k:word@b", path="notes/run.txt")
    data, info = _read(uri, run_id).data, _read(uri, run_id).info
    assert data.params["pooling.power"] == "0.4"
    assert data.params["optim.lr"] == "0.001"
    assert data.params["extra.149"] == "149"
    assert len(data.params["long"]) == 500
    assert data.params["data.train"] == "s3://bucket/t"
    assert data.tags["where"] == "https://host/x"
    assert (info.status, info.run_name) == ("RUNNING", "one")
    text = storage / "mlartifacts" / run_id / "artifacts" / "notes" / "run.txt"
    assert text.read_text() == "from s3://b"


def test_a_text_is_read_without_a_progress_bar(
    uri: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", raising=False)
    run_id = _open(uri)
    assert tracking.read_text(uri, run_id, path="notes/run.txt") == ""
    tracking.log_text(uri, run_id, text="hello", path="notes/run.txt")
    assert tracking.read_text(uri, run_id, path="notes/run.txt") == "hello"
    assert "Downloading" not in capfd.readouterr().err


def test_files_are_kept_as_artifacts(uri: str, storage: Path) -> None:
    run_id = _open(uri)
    figure = storage / "figure.svg"
    figure.write_text("<svg/>")
    tracking.log_file(uri, run_id, file=figure, folder="figures")
    kept = storage / "mlartifacts" / run_id / "artifacts" / "figures" / "figure.svg"
    assert kept.read_text() == "<svg/>"


def test_figures_are_drawn_and_kept_beside_the_training(
    uri: str, storage: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_id = _open(uri)
    writer, may_end = tracking.FigureWriter(uri, run_id), threading.Event()

    def draw(file: Path) -> None:
        may_end.wait(CLOSE_S)
        file.write_text("drawn")

    names = [f"{at}.png" for at in range(7)]
    for name in names:  # one is drawn, and four wait
        writer.log(draw, path=f"probes/{name}")
    assert "probes/6.png is left out: others are not kept yet" in caplog.text
    may_end.set()
    writer.close(CLOSE_S)
    folder = storage / "mlartifacts" / run_id / "artifacts" / "probes"
    kept = {file.name: file.read_text() for file in folder.iterdir()}
    assert kept.items() >= dict.fromkeys(names[:4], "drawn").items()
    assert "6.png" not in kept
    writer.log(lambda file: file.parent.joinpath("no/file").touch(), path="third.png")
    writer.close(CLOSE_S)
    assert "third.png is left out: FileNotFoundError" in caplog.text
    assert {file.name for file in folder.iterdir()} == kept.keys()


def test_a_run_that_restarts_stays_one_run(uri: str) -> None:
    run_id = _open(uri, lr=0.1, workers=4)
    tracking.end_run(uri, run_id, status="FAILED", reason="lost a worker\n  at line 3")
    ended = _read(uri, run_id)
    assert ended.info.status == "FAILED"
    assert ended.data.tags["failure_reason"] == "lost a worker"
    assert _open(uri, run_id=run_id, lr=0.1, workers=2) == run_id
    reopened = _read(uri, run_id)
    assert reopened.info.status == "RUNNING"
    assert "failure_reason" not in reopened.data.tags
    assert reopened.data.tags["num_restarts"] == "1"
    assert reopened.data.params == {"lr": "0.1", "workers": "4"}
    assert reopened.data.tags["resumed.workers"] == "2"
    assert "resumed.lr" not in reopened.data.tags
    _open(uri, run_id=run_id)
    tracking.end_run(uri, run_id, status="FINISHED")
    finished = _read(uri, run_id)
    assert finished.info.status == "FINISHED"
    assert finished.data.tags["num_restarts"] == "2"
    found = MlflowClient(uri).search_runs([finished.info.experiment_id])
    assert [run.info.run_id for run in found].count(run_id) == 1


@pytest.mark.parametrize("lost", ["deleted", "unknown"])
def test_a_run_that_is_gone_is_created_anew(uri: str, lost: str) -> None:
    run_id = _open(uri) if lost == "deleted" else "0" * 32
    if lost == "deleted":
        MlflowClient(uri).delete_run(run_id)
    new_id = _open(uri, run_id=run_id, lr=1)
    assert new_id not in ("", run_id)
    assert _read(uri, new_id).data.params == {"lr": "1"}


def test_a_run_whose_id_was_never_noted_is_found_by_its_place(uri: str) -> None:
    """A driver may be killed between the two; another of that name is not taken."""

    def opened(place: str, *, is_begun: bool) -> str:
        return tracking.open_run(
            uri,
            experiment="tests",
            name="a",
            params={"lr": 1},
            tags={},
            place=place,
            is_begun=is_begun,
        )

    first = opened("runs/a", is_begun=False)
    assert opened("other/a", is_begun=True) != first
    assert opened("runs/a", is_begun=True) == first
    assert _read(uri, first).data.tags["num_restarts"] == "1"
    assert opened("runs/a", is_begun=False) != first


def test_a_trial_that_was_recorded_but_not_noted_is_one_run(uri: str) -> None:
    def logged(parent: str) -> str:
        return log_child(
            uri,
            experiment="tests",
            name="heads-0001",
            params={"lr": 1},
            tags={PARENT_TAG: parent},
            reports=[{"epoch": 1, "head/loss": 2.0}],
        )

    first = logged("one")
    assert logged("other") != first
    assert logged("one") == first
    assert _history(uri, first, "head/loss") == [(1, 2.0)]


def test_a_long_reason_is_cut_and_has_no_password(uri: str) -> None:
    run_id = _open(uri)
    reason = "no s3://me:word@bucket/x " + "y" * 900
    tracking.end_run(uri, run_id, status="FAILED", reason=reason)
    kept = _read(uri, run_id).data.tags["failure_reason"]
    assert kept.startswith("no s3://bucket/x yyy")
    assert len(kept) == 500


def test_a_dataset_is_an_input_of_the_run(uri: str) -> None:
    run_id = _open(uri)
    for _ in range(2):
        tracking.log_dataset(
            uri,
            run_id,
            name="imagenet",
            source="s3://me:word@bucket/train",
            num_rows=1281167,
            num_shards=1024,
            digest="ab" * 32,
            context="train",
        )
    run = _read(uri, run_id)
    assert run.inputs is not None
    (logged,) = run.inputs.dataset_inputs
    assert (logged.dataset.name, logged.dataset.source_type) == ("imagenet", "s3")
    assert logged.dataset.digest == "ab" * 18
    assert "word" not in logged.dataset.source
    assert [tag.value for tag in logged.tags] == ["train"]
    assert run.data.tags["data.train.digest"] == "ab" * 32
    assert run.data.tags["data.train.num_rows"] == "1281167"
    assert run.data.tags["data.train.num_shards"] == "1024"
    assert run.data.tags["data.train.source"] == "s3://bucket/train"


def test_metrics_arrive_by_step_and_the_latest_is_the_highest_step(uri: str) -> None:
    run_id = _open(uri)
    writer = tracking.MetricWriter(uri, run_id)
    for step in range(0, 40, 10):
        writer.log({"loss": step / 10, "top 1 (%)": float("nan")}, step=step)
    assert writer.close(CLOSE_S) == 0
    resumed = tracking.MetricWriter(uri, run_id)
    resumed.log({"loss": 2.5}, step=20)
    assert resumed.close(CLOSE_S) == 0
    assert _read(uri, run_id).data.metrics["loss"] == 3.0
    resumed = tracking.MetricWriter(uri, run_id)
    resumed.log({"loss": 3.5}, step=30)
    assert resumed.close(CLOSE_S) == 0
    expected = [(0, 0.0), (10, 1.0), (20, 2.0), (20, 2.5), (30, 3.0), (30, 3.5)]
    assert sorted(_history(uri, run_id, "loss")) == expected
    metrics = _read(uri, run_id).data.metrics
    assert metrics["loss"] == 3.5
    assert "top 1 ___" in metrics


def test_what_is_no_number_is_left_out_with_one_warning(
    uri: str, caplog: pytest.LogCaptureFixture
) -> None:
    run_id = _open(uri)
    writer = tracking.MetricWriter(uri, run_id)
    for step in range(3):
        writer.log({"name": "so_vit", "loss": 1.0}, step=step)  # pyright: ignore
    assert writer.close(CLOSE_S) == 0
    assert list(_read(uri, run_id).data.metrics) == ["loss"]
    assert caplog.text.count("is left out") == 1


def test_without_a_run_nothing_is_called() -> None:
    nowhere = "http://256.0.0.1"
    writer = tracking.MetricWriter(nowhere, "")
    writer.log({"loss": 1.0}, step=0)
    assert writer.close(CLOSE_S) == 0
    tracking.end_run(nowhere, "", status="FINISHED")
    tracking.log_text(nowhere, "", text="a", path="b")
    tracking.log_file(nowhere, "", file=Path("none"))
    figures = tracking.FigureWriter(nowhere, "")
    figures.log(lambda file: pytest.fail(f"{file} is drawn"), path="a.png")
    figures.close(CLOSE_S)
    assert tracking.log_model(nowhere, "", checkpoint=Path("none"), example=b"") == ""
