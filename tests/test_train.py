"""The whole way on real parts: Ray Data, DALI, Ray Train, checkpoints and MLflow.

Ray takes seconds to start a group of workers, so each test here shows several things.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import re
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from mlflow import MlflowClient

from pipelines import tracking
from pipelines.checkpoints.manifest import read_manifest
from pipelines.checkpoints.run_record import read_record
from pipelines.config import Augment, Run
from pipelines.data.shard_set import read_shard_set
from pipelines.driver.fit import fit
from pipelines.errors import RunFailedError
from pipelines.evaluate import Options, evaluate_checkpoint
from pipelines.train import _main
from pipelines.worker.audit_log import AuditLog, Trained, trained
from pipelines.worker.job import Trained as Ended
from tests.demo_runs import part_of_demo, small_demo
from tests.processes import descendants_named
from tests.small_runs import supply_of
from tests.waiting import wait_for

pytestmark = pytest.mark.ray


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have Ray Train look after its workers more often than every two seconds.

    It takes one report at a time, and each of ours comes with a checkpoint.
    """
    monkeypatch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")


def signal_one_worker_when(
    condition: Callable[[], bool], *, what: str, number: signal.Signals
) -> Future[int]:
    """Send one training process a signal, once a condition holds.

    The future holds its id, or what went wrong.
    """

    def send() -> int:
        wait_for(condition, what=what)
        workers = descendants_named("RayTrainWorker")
        assert workers, "no training process there"
        os.kill(workers[-1], number)
        return workers[-1]

    return ThreadPoolExecutor(1).submit(send)


def runs_of(storage: str) -> list:
    client = MlflowClient(tracking.default_uri(storage))
    experiment = client.get_experiment_by_name("sovit")
    assert experiment is not None
    return client.search_runs([experiment.experiment_id])


AUGMENT = Augment(
    interpolation="random", auto_augment="rand-m9-mstd0.5-inc1", re_prob=0.25
)
BAD_ROWS = (33, 290)
MOST_OBJECT_STORE_BYTES = 1 << 30


def audited_run(folder: Path, **settings: Any) -> Run:
    """Make a run with bad images that keeps checkpoints in epochs and an audit log."""
    # A step takes long enough for a signal to meet it.
    settings = {"token_embed": "resnet", **settings}
    return dataclasses.replace(
        small_demo(folder, bad_rows=BAD_ROWS, **settings),
        augment=AUGMENT,
        checkpoint_every_steps=4,
        audit_log=str(folder / "keys"),
    )


def as_planned(run: Run) -> list[Trained]:
    """Give what a run should be trained on, pixels included: one worker, no Ray."""
    data = dataclasses.replace(run.data, num_decode_threads=2)
    shards = read_shard_set(run.data.train)
    supply = supply_of(dataclasses.replace(run, data=data), shards=shards)
    log = AuditLog(Path(run.storage).parent / "planned", attempt=0, step=0, rank=0)
    step = 0
    for batch in supply:
        log(batch, step)
        step += batch.ends_step
    supply.close()
    log.close()
    return trained(Path(run.storage).parent / "planned")


def check_exact(run: Run) -> None:
    """Every good image once an epoch; batches and pixels as one worker makes them."""
    found = trained(Path(run.audit_log))
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
    for path in sorted(Path(run.audit_log).glob("*.csv")):
        attempt, step, _ = path.stem.split("-")
        found.setdefault(attempt, []).append(int(step))
    return [(steps[0], len(steps)) for steps in found.values()]


def num_steps_of(run: Run, *, attempt: int) -> int:
    """Count the steps of a group of workers, the first of which is 0, so far."""
    attempts: dict[str, set[str]] = {}
    for path in sorted(Path(run.audit_log).glob("*.csv")):
        lines = path.read_text().splitlines()
        steps = attempts.setdefault(path.stem.split("-")[0], set())
        steps.update(line.split(",")[0] for line in lines)
    return len(list(attempts.values())[attempt]) if len(attempts) > attempt else 0


def is_there(process: int) -> bool:
    return Path(f"/proc/{process}").exists()


@contextlib.contextmanager
def full_object_store() -> Iterator[None]:
    """Hold an eighth more than Ray's object store has room for, so that it spills.

    One that would take gigabytes of a machine's memory is left as it is.
    """
    room = int(ray.cluster_resources()["object_store_memory"])
    num_blocks = 9 if room <= MOST_OBJECT_STORE_BYTES else 0
    blocks = [ray.put(np.zeros(room // 8, np.uint8)) for _ in range(num_blocks)]
    yield
    del blocks


def test_a_run_with_a_worker_killed_and_another_stopped_that_goes_on(
    ray_local: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two workers, two again, then one: the same batches, the same pixels.

    The last finds Ray's object store full.
    """
    run = audited_run(tmp_path, num_epochs=4, max_failures=1)
    # From one step to the next it takes 0.4 s on two cores with a load of 11.
    run = dataclasses.replace(
        run, scale=dataclasses.replace(run.scale, hang_timeout_s=20)
    )
    first = tmp_path / "runs" / "killed" / "step_00000012"
    senders = [
        signal_one_worker_when(first.exists, what=f"{first}", number=signal.SIGKILL),
        signal_one_worker_when(
            lambda: num_steps_of(run, attempt=1) >= 2,
            what="the workers to start again",
            number=signal.SIGSTOP,
        ),
    ]
    with pytest.raises(RunFailedError):
        fit(run, name="killed")
    stopped = [sender.result(timeout=0) for sender in senders][-1]
    wait_for(lambda: not is_there(stopped), what="the stopped worker's end")
    # Whoever is first: the other worker's watchdog or Ray's look at the stopped one.
    said = r"no step for 20 s \(training\); ended|health check has been hanging"
    assert re.search(said, capsys.readouterr().out)
    (tracked,) = runs_of(run.storage)
    assert tracked.info.status == "FAILED"
    assert tracked.data.tags["failure_reason"]

    with pytest.raises(ValueError, match="already holds"):
        fit(run, name="killed")
    with pytest.raises(ValueError, match=r"optim\.lr"):
        _main(["--resume", "killed", "--storage", run.storage, "--optim.lr", "1"])

    with full_object_store():
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
    monkeypatch.setattr("pipelines.driver.preflight.spot_check", lambda shards: 0)
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
        (few, "expected labels 0 to 1"),
    ]:
        with pytest.raises(ValueError, match=said):
            _main(["demo", "--data.train", str(place), *storage])
    assert not (tmp_path / "runs").exists()
