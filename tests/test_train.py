"""The whole way on real parts: Ray Data, DALI, Ray Train, checkpoints and MLflow.

Ray takes seconds to start a group of workers, so each test here shows several things.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from pipelines import tracking
from pipelines.checkpoint import read_manifest
from pipelines.errors import RunFailedError
from pipelines.evaluate import Options, evaluate_checkpoint
from pipelines.runs import read_record
from pipelines.train import _main, fit
from tests.demo_runs import part_of_demo, small_demo
from tests.processes import descendants_named

pytestmark = pytest.mark.ray


def kill_one_worker_after(first_checkpoint: Path) -> Future[int]:
    """Kill one training process by signal, once a checkpoint is there.

    The future holds its id, or what went wrong.
    """

    def kill() -> int:
        wait_for(first_checkpoint.exists, what=f"{first_checkpoint}")
        workers = descendants_named("RayTrainWorker")
        assert workers, "no training process to kill"
        os.kill(workers[-1], signal.SIGKILL)
        return workers[-1]

    return ThreadPoolExecutor(1).submit(kill)


def wait_for(condition: Callable[[], bool], *, what: str, seconds: float = 120) -> None:
    deadline_s = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline_s, f"waited {seconds} s for {what}"
        time.sleep(0.05)


def runs_of(storage: str) -> list:
    from mlflow import MlflowClient

    client = MlflowClient(tracking.default_uri(storage))
    experiment = client.get_experiment_by_name("sovit")
    assert experiment is not None
    return client.search_runs([experiment.experiment_id])


def test_worker_killed(ray_local: None, tmp_path: Path) -> None:
    """A worker dies by SIGKILL: all epochs are trained, and it is one MLflow run."""
    run = small_demo(tmp_path, num_epochs=8)
    killer = kill_one_worker_after(tmp_path / "runs" / "killed" / "epoch_0001")
    result = fit(run, name="killed")
    assert killer.result(timeout=0) > 0, "nobody was killed"

    assert result.checkpoint is not None
    folder = Path(result.checkpoint.path)
    manifest = read_manifest(folder)
    assert manifest.position.epoch == 8
    assert manifest.position.step == 8 * 10  # ceil(301 / 32)
    assert manifest.metrics["val/num_images"] == 101

    (tracked,) = runs_of(run.storage)
    assert tracked.info.status == "FINISHED"
    assert tracked.data.params["pooling.power"] == "0.5"
    assert tracked.data.metrics["epoch"] == 8
    assert tracked.data.metrics["train/images_per_s"] > 0

    # The same weights on the same images, in one process and without Ray.
    options = Options(checkpoint=str(folder), shards=run.data.val, batch_size=64)
    again = evaluate_checkpoint(options)
    assert again["num_images"] == 101
    assert again["top1"] == pytest.approx(manifest.metrics["val/top1"])
    assert again["loss"] == pytest.approx(manifest.metrics["val/loss"], rel=1e-4)

    with pytest.raises(ValueError, match="has finished"):
        read_record(run.storage, name="killed")


def test_failed_run_is_resumed(ray_local: None, tmp_path: Path) -> None:
    """A run that failed says so; resumed with one worker, it ends as the same run."""
    run = small_demo(tmp_path, num_epochs=6, max_failures=0)
    killer = kill_one_worker_after(tmp_path / "runs" / "again" / "epoch_0002")
    with pytest.raises(RunFailedError):
        fit(run, name="again")
    assert killer.result(timeout=0) > 0, "nobody was killed"
    (tracked,) = runs_of(run.storage)
    assert tracked.info.status == "FAILED"
    assert tracked.data.tags["failure_reason"]

    with pytest.raises(ValueError, match="already holds"):
        fit(run, name="again")
    with pytest.raises(ValueError, match=r"optim\.lr"):
        _main(["--resume", "again", "--storage", run.storage, "--optim.lr", "1"])

    record = read_record(run.storage, name="again")
    scale = dataclasses.replace(record.run.scale, num_workers=1)
    one_worker = dataclasses.replace(record.run, scale=scale)
    result = fit(one_worker, name="again", record=record)
    assert result.checkpoint is not None
    position = read_manifest(Path(result.checkpoint.path)).position
    assert (position.epoch, position.step) == (6, 60)
    (tracked,) = runs_of(run.storage)
    assert tracked.info.status == "FINISHED"


def damage(folder: str) -> Path:
    """Overwrite the first page of a set's first shard: its image column."""
    shard = min(Path(folder).glob("*.parquet"))
    content = bytearray(shard.read_bytes())
    content[8:400] = bytes(392)
    shard.write_bytes(content)
    return shard


def test_damage_met_in_training_ends_the_run(
    ray_local: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A damaged shard that the check missed ends the run at once, by its name."""
    run = small_demo(tmp_path, num_epochs=2, num_workers=1, max_failures=3)
    shard = damage(run.data.train)
    monkeypatch.setattr("pipelines.preflight.spot_check", lambda shards: 0)
    with pytest.raises(ValueError, match=shard.name):
        fit(run, name="damaged")
    (tracked,) = runs_of(run.storage)
    assert tracked.info.status == "FAILED"
    assert shard.name in tracked.data.tags["failure_reason"]


def test_damage_is_found_before_anything_starts(tmp_path: Path) -> None:
    """A damaged shard of a small set is named before Ray is started."""
    run = small_demo(tmp_path, num_epochs=2)
    shard = damage(run.data.val)
    with pytest.raises(ValueError, match=shard.name):
        fit(run, name="damaged")
    assert not Path(run.storage).exists()


def test_more_workers_than_there_are_cpus(ray_local: None, tmp_path: Path) -> None:
    """Too many workers are refused before anything waits for them."""
    run = small_demo(tmp_path, num_epochs=1, num_workers=9)
    with pytest.raises(ValueError, match=r"scale\.num-workers"):
        fit(run, name="crowded")
    assert not Path(run.storage).exists()


def test_sets_that_can_not_be_used(tmp_path: Path) -> None:
    """Missing, empty and mismatched sets are told apart before Ray is started."""
    good = part_of_demo(tmp_path / "good", split="train", num_rows=20)
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "classes.json").write_text((good / "classes.json").read_text())
    few = part_of_demo(tmp_path / "few", split="val", num_rows=20)
    (few / "classes.json").write_text('["one", "two"]')
    storage = ["--storage", str(tmp_path / "runs")]

    for place, said in [
        (tmp_path / "none", "not there"),
        (empty, "empty set"),
        (few, "wanted labels 0 to 1"),
    ]:
        with pytest.raises(ValueError, match=said):
            _main(["demo", "--data.train", str(place), *storage])
    assert not (tmp_path / "runs").exists()
