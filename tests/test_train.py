"""The whole way on real parts: Ray Data, DALI, Ray Train, checkpoints and MLflow.

Ray takes seconds to start a group of workers, so each test here shows several things.
"""

from __future__ import annotations

import dataclasses
import math
import os
import signal
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from pipelines import tracking
from pipelines.checkpoint import read_manifest
from pipelines.config import Augment, Run
from pipelines.errors import RunFailedError
from pipelines.evaluate import Options, evaluate_checkpoint
from pipelines.ingest.footers import read_shard_set
from pipelines.job import Trained as Ended
from pipelines.key_log import KeyLog, Trained, trained
from pipelines.runs import read_record
from pipelines.train import _main, fit
from tests.demo_runs import part_of_demo, small_demo
from tests.processes import descendants_named
from tests.small_runs import supply_of
from tests.waiting import wait_for

pytestmark = pytest.mark.ray


def kill_one_worker_when(condition: Callable[[], bool], *, what: str) -> Future[int]:
    """Kill one training process by signal, once a condition holds.

    The future holds its id, or what went wrong.
    """

    def kill() -> int:
        wait_for(condition, what=what, seconds=240)
        workers = descendants_named("RayTrainWorker")
        assert workers, "no training process to kill"
        os.kill(workers[-1], signal.SIGKILL)
        return workers[-1]

    return ThreadPoolExecutor(1).submit(kill)


def runs_of(storage: str) -> list:
    client = MlflowClient(tracking.default_uri(storage))
    experiment = client.get_experiment_by_name("sovit")
    assert experiment is not None
    return client.search_runs([experiment.experiment_id])


AUGMENT = Augment(
    interpolation="random", auto_augment="rand-m9-mstd0.5-inc1", re_prob=0.25
)
BAD_ROWS = (33, 290)


def audited_run(folder: Path, **settings: Any) -> Run:
    """Make a run with bad images that keeps checkpoints within epochs and a key log."""
    return dataclasses.replace(
        small_demo(folder, bad_rows=BAD_ROWS, **settings),
        augment=AUGMENT,
        checkpoint_every_steps=4,
        key_log=str(folder / "keys"),
    )


def as_planned(run: Run) -> list[Trained]:
    """Give what a run should be trained on, pixels included: one worker, no Ray."""
    data = dataclasses.replace(run.data, num_decode_threads=2)
    shards = read_shard_set(run.data.train)
    supply = supply_of(dataclasses.replace(run, data=data), shards=shards)
    log = KeyLog(
        Path(run.storage).parent / "planned", attempt=0, step=0, rank=0, num_repeats=1
    )
    step = 0
    for batch in supply:
        log(batch, step)
        step += batch.ends_step
    supply.close()
    log.close()
    return trained(Path(run.storage).parent / "planned")


def check_exact(run: Run) -> None:
    """Every good image once an epoch; batches and pixels as one worker makes them."""
    found = trained(Path(run.key_log))
    good = sorted(set(range(301)) - set(BAD_ROWS))
    for epoch in range(run.optim.num_epochs):
        rows = [item.row for item in found if item.epoch == epoch]
        assert sorted(rows) == good
    planned = as_planned(run)
    assert found == planned
    assert len({item.crc32 for item in found}) > 0.99 * len(found)


def attempts_of(run: Run) -> list[tuple[int, int]]:
    """Give the step that each group of workers began at, and how many there were."""
    found: dict[str, list[int]] = {}
    for path in sorted(Path(run.key_log).glob("*.csv")):
        attempt, step, _ = path.stem.split("-")
        found.setdefault(attempt, []).append(int(step))
    return [(steps[0], len(steps)) for steps in found.values()]


def test_a_run_whose_workers_are_killed_twice_and_that_goes_on(
    ray_local: None, tmp_path: Path
) -> None:
    """Two workers, two again, then one: the same batches, the same pixels."""
    run = audited_run(tmp_path, num_epochs=4, max_failures=1)
    first = tmp_path / "runs" / "killed" / "step_00000012"
    killers = [
        kill_one_worker_when(first.exists, what=f"{first}"),
        kill_one_worker_when(
            lambda: len(attempts_of(run)) == 2, what="the workers to start again"
        ),
    ]
    with pytest.raises(RunFailedError):
        fit(run, name="killed")
    assert all(killer.result(timeout=0) > 0 for killer in killers), "nobody was killed"
    (tracked,) = runs_of(run.storage)
    assert tracked.info.status == "FAILED"
    assert tracked.data.tags["failure_reason"]

    with pytest.raises(ValueError, match="already holds"):
        fit(run, name="killed")
    with pytest.raises(ValueError, match=r"optim\.lr"):
        _main(["--resume", "killed", "--storage", run.storage, "--optim.lr", "1"])

    result = fit_again(run, num_workers=1)
    begun = attempts_of(run)
    assert [num_workers for _, num_workers in begun] == [2, 2, 1]
    assert all(step % 4 == 0 or step % 10 == 0 for step, _ in begun)
    assert any(step % 10 for step, _ in begun)  # within an epoch
    check_exact(run)
    check_end(result, run=run)


def check_end(result: Ended, *, run: Run) -> None:
    """Checkpoint, MLflow and another evaluation say the same of the run."""
    assert result.checkpoint is not None
    folder = Path(str(result.checkpoint))
    manifest = read_manifest(folder)
    assert manifest.position.epoch == 4
    assert manifest.position.step == 4 * 10  # ceil(301 / 32)
    assert manifest.metrics["val/num_images"] == 100
    assert manifest.metrics["val/bad_images"] == 1
    assert manifest.metrics["train/bad_images"] == 2

    (tracked,) = runs_of(run.storage)
    assert tracked.info.status == "FINISHED"
    assert tracked.data.params["pooling.power"] == "0.5"
    assert tracked.data.metrics["epoch"] == 4
    assert tracked.data.metrics["train/images_per_s"] > 0
    assert tracked.data.metrics["train/peak_memory_mb"] > 100
    uri = tracking.default_uri(run.storage)
    # MLflow's compare page shows what came first: the accuracy, before it has a value.
    points = MlflowClient(uri).get_metric_history(tracked.info.run_id, "val/top1")
    assert math.isnan(points[0].value)
    # A step that was trained on again after a restart is there twice.
    assert sorted({point.step for point in points}) == [0, 10, 20, 30, 40]
    kept = tracking.read_text(uri, tracked.info.run_id, path="bad_images.csv")
    named = sorted(line.split(",")[0] for line in kept.splitlines())
    assert named == ["split", "train", "train", "val"]
    assert kept.count("cut off") == 3

    # The same weights on the same images, in one process and without Ray.
    options = Options(checkpoint=str(folder), shards=run.data.val, batch_size=64)
    again = evaluate_checkpoint(options)
    assert again["num_images"] == 100
    assert again["num_bad"] == 1
    assert again["top1"] == pytest.approx(manifest.metrics["val/top1"])
    assert again["loss"] == pytest.approx(manifest.metrics["val/loss"], rel=1e-4)

    with pytest.raises(ValueError, match="has finished"):
        read_record(run.storage, name="killed")


def fit_again(run: Run, *, num_workers: int) -> Ended:
    """Go on with the run named killed."""
    record = read_record(run.storage, name="killed")
    scale = dataclasses.replace(record.run.scale, num_workers=num_workers)
    run = dataclasses.replace(record.run, scale=scale)
    return fit(run, name="killed", record=record)


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
