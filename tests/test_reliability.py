"""What happens to a run when things fail under it, row by row of docs/reliability.md.

In one process, where the code is that of Ray's workers. Workers that are killed or hang
are in test_train.py, drivers that are killed in test_cut.py.
"""

from __future__ import annotations

import dataclasses
import pickle
import re
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run as MlflowRun

from pipelines import tracking
from pipelines.checkpoints.manifest import opened
from pipelines.checkpoints.run_record import read_record
from pipelines.checkpoints.store import CheckpointStore
from pipelines.config import Run
from pipelines.data.batch import Batch
from pipelines.driver.failures import StopOnValueError
from pipelines.driver.fit import fit
from pipelines.errors import NonFiniteLossError, RewindError
from pipelines.storage import filesystem, retry
from pipelines.storage.path import StoragePath
from pipelines.train import _main
from pipelines.training import step as steps
from pipelines.training.state import TrainState
from pipelines.worker import checkpointing
from pipelines.worker.job import Trained
from tests.disks import Disk, small_disk
from tests.fault_runs import At, brief_run, learnt
from tests.mlflow_stores import prepare_store
from tests.s3_server import BUCKET, Line, s3_server
from tests.waiting import wait_for

NUM_STEPS = 20
# Of brief_run a checkpoint has 6 MB. Two are kept, and the best, while one is written.
DISK_MB = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("reliability")


@pytest.fixture(scope="module")
def base(folder: Path) -> Run:
    """Make the run that all tests take: two epochs of ten steps."""
    base = brief_run(folder, num_epochs=2)
    prepare_store(base.storage)
    return base


@pytest.fixture(scope="module")
def whole(base: Run) -> dict[str, Any]:
    """Give what a run learns under which nothing fails."""
    return learnt(Path(str(trained(base, "whole").checkpoint)))


@pytest.fixture(autouse=True)
def uri(base: Run, whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> str:
    """Share one MLflow store, which no fault of a test befalls."""
    uri = tracking.default_uri(base.storage)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    return uri


@pytest.fixture
def run(base: Run, tmp_path: Path) -> Run:
    """Give the run a storage of its own."""
    return dataclasses.replace(base, storage=str(tmp_path / "runs"))


def trained(run: Run, name: str, actions: Mapping[int, Any] | None = None) -> Trained:
    return fit(run, name=name, callbacks=[At(actions or {})], keep_model=False)


def gone_on_with(run: Run, name: str) -> Trained:
    record = read_record(run.storage, name=name)
    return fit(record.run, name=name, record=record, keep_model=False)


def tracked(uri: str, name: str) -> MlflowRun:
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("sovit")
    assert experiment is not None
    found = client.search_runs([experiment.experiment_id])
    (run,) = [item for item in found if item.info.run_name == name]
    return run


def newest_of(run: Run, name: str) -> str:
    store = CheckpointStore(StoragePath(run.storage).within(name), num_to_keep=2)
    return store.newest()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    with small_disk(tmp_path / "disk", size_mb=DISK_MB) as disk:
        yield disk


def test_a_disk_that_is_full_for_a_while_costs_the_checkpoints_of_that_while(
    run: Run,
    disk: Disk,
    whole: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """MLflow's file lies on the same disk, as it does by default."""
    run = dataclasses.replace(run, storage=str(disk.folder / "runs"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    here = prepare_store(run.storage)
    seen = []

    def free() -> None:
        seen.append(newest_of(run, "full"))
        # Its thread may come to the points of that while only now.
        wait_for(lambda: "takes no metrics" in caplog.text, what="MLflow")
        disk.free()

    ended = trained(run, "full", {2: disk.fill, 4: free})
    assert "no checkpoint epoch_0001, the one before stays: " in capsys.readouterr().out
    assert seen[0] in ("step_00000004", "step_00000008")
    assert learnt(Path(str(ended.checkpoint))) == whole
    at = tracked(here, "full")
    assert at.info.status == "FINISHED"
    points = MlflowClient(here).get_metric_history(at.info.run_id, "train/loss")
    assert [point.step for point in points] == [5, 10, 15, 20]
    assert "takes metrics again" in caplog.text


@pytest.mark.parametrize("fault", ["full", "forbidden"])
def test_a_disk_that_stays_so_ends_the_run_which_goes_on_once_it_is_mended(
    run: Run, disk: Disk, whole: dict[str, Any], uri: str, fault: str
) -> None:
    storage = str(disk.folder / "runs")
    run = dataclasses.replace(run, storage=storage, max_failed_checkpoints=1)
    fail, mend = {
        "full": (disk.fill, disk.free),
        "forbidden": (disk.forbid, disk.allow),
    }[fault]
    said = (
        r"expected to write a checkpoint, got .*, for the 2\. time in a row; .*resume"
    )
    with pytest.raises(ValueError, match=said) as caught:
        trained(run, fault, {2: fail})
    assert "\n" not in str(caught.value)
    assert tracked(uri, fault).info.status == "FAILED"
    assert newest_of(run, fault) in ("step_00000004", "step_00000008")
    mend()
    ended = gone_on_with(run, fault)
    assert learnt(Path(str(ended.checkpoint))) == whole
    assert tracked(uri, fault).info.status == "FINISHED"


@pytest.fixture
def line(monkeypatch: pytest.MonkeyPatch) -> Iterator[Line]:
    monkeypatch.setattr(retry, "_WAITS_S", (0.001,) * 4)
    monkeypatch.setattr(filesystem, "_CLIENT_TRIES", 1)
    with s3_server() as line:
        yield line


def test_a_bucket_that_is_away_costs_the_checkpoints_of_that_while(
    run: Run, line: Line, whole: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    run = dataclasses.replace(run, storage=f"s3://{BUCKET}/runs")
    actions = {2: lambda: line.fail(".", num=10**6), 4: line.mend}
    ended = trained(run, "away", actions)
    assert "no checkpoint epoch_0001, the one before stays: " in capsys.readouterr().out
    assert ended.checkpoint is not None
    with opened(ended.checkpoint) as folder:
        assert learnt(folder) == whole


def spoilt(monkeypatch: pytest.MonkeyPatch, *, step: int, num: int) -> None:
    """Let a step's images hold what is no number, the first `num` times that it comes.

    Steps count from 0, and an epoch has ten of them.
    """
    mixed, left = steps.mixed, [num]

    def spoil(batch: Batch, **settings: Any) -> Any:
        images, targets = mixed(batch, **settings)
        if 10 * batch.epoch + batch.index == step and left[0]:
            left[0] -= 1
            images = images * float("nan")
        return images, targets

    monkeypatch.setattr(steps, "mixed", spoil)


def on_nonfinite(run: Run, what: str) -> Run:
    return dataclasses.replace(
        run, optim=dataclasses.replace(run.optim, on_nonfinite=what)
    )


def test_a_loss_that_is_no_number_once_is_gone_back_for(
    run: Run,
    whole: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As after a fault of the hardware: the weights are the unbroken run's.

    And the state that was left is gone before the next is built beside it.
    """
    spoilt(monkeypatch, step=13, num=1)
    build, refs, num_left = (
        checkpointing.build_state,
        list[weakref.ref[Any]](),
        list[int](),
    )

    def watched(*arguments: Any, **settings: Any) -> TrainState:
        num_left.append(sum(ref() is not None for ref in refs))
        state = build(*arguments, **settings)
        assert state.ema is not None
        whole = (*state.model.parameters(), *state.ema.parameters(), state.optimizer)
        refs.extend(map(weakref.ref, whole))
        return state

    monkeypatch.setattr(checkpointing, "build_state", watched)
    ended = trained(on_nonfinite(run, "rewind"), "rewound")
    said = capsys.readouterr().out
    assert "back to the last checkpoint: expected a finite loss, got nan or" in said
    # Images by their keys, which are read from the shards.
    assert re.search(r"at step 13, worker 0, images (?!row \d)\S", said)
    assert "1 worker on" in said
    assert "; from step 12\n" in said
    assert learnt(Path(str(ended.checkpoint))) == whole
    assert num_left == [0, 0]


def test_a_loss_that_is_no_number_again_at_the_same_step_ends_the_run(
    run: Run, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoilt(monkeypatch, step=13, num=2)
    with pytest.raises(NonFiniteLossError, match=r"at step 13, .*, again; lower --opt"):
        trained(on_nonfinite(run, "rewind"), "again")
    assert newest_of(run, "again") == "step_00000012"
    reason = tracked(uri, "again").data.tags["failure_reason"]
    assert reason.startswith("expected a finite loss, got nan or infinity at step 13")


def test_a_loss_that_is_no_number_can_be_left_out(
    run: Run,
    whole: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    spoilt(monkeypatch, step=13, num=99)
    ended = trained(on_nonfinite(run, "skip"), "skipped")
    assert "steps left out: 1, 1 in all; got nan or inf" in capsys.readouterr().out
    found = learnt(Path(str(ended.checkpoint)))
    assert found["position"] == whole["position"]
    assert found["weights"] != whole["weights"]
    assert ended.metrics["train/loss"] > 0


def test_on_workers_the_controller_counts_how_often_they_go_back() -> None:
    told: list[Any] = []
    callback = StopOnValueError(told.append, max_rewinds=2)

    def fail(step: int) -> None:
        # It comes from another process, from all of them alike.
        error = pickle.loads(pickle.dumps(RewindError(f"got nan at step {step}", step)))
        callback.after_exception(None, {0: error, 1: error})

    fail(13)
    fail(15)
    assert [item.rank for item in told] == [0, 1, 0, 1]
    with pytest.raises(NonFiniteLossError, match=r"step 17, for the 3\. time; lower"):
        fail(17)
    callback = StopOnValueError(told.append, max_rewinds=2)
    fail(13)
    with pytest.raises(NonFiniteLossError, match="step 13, again; lower"):
        fail(13)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nonesuch"], "expected a recipe, got 'nonesuch'; there are "),
        (["demo", "--optim.lr", "-1"], "optim.lr: expected above 0, got -1"),
        (
            ["demo", "--model.name", "nonesuch"],
            "model.name: expected a model that timm",
        ),
        (["demo", "--data.train", "/nonesuch"], "/nonesuch"),
    ],
)
def test_a_bad_recipe_is_one_line_and_leaves_nothing(
    arguments: list[str], said: str, tmp_path: Path
) -> None:
    storage = tmp_path / "runs"
    with pytest.raises(ValueError, match=r".") as caught:
        _main([*arguments, "--storage", str(storage)])
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not storage.exists()
