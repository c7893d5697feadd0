"""A run in the calling process: the same files and records, without any Ray."""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray.train import UserCallback
from safetensors.torch import load_file

from pipelines.checkpoints.manifest import read_manifest
from pipelines.checkpoints.run_record import read_record
from pipelines.checkpoints.snapshot import EMA_FILE, MANIFEST
from pipelines.config import Run
from pipelines.config.serialization import to_json
from pipelines.driver.fit import fit
from pipelines.errors import InterruptedRun, RunFailedError, StoppedEarly
from pipelines.train import _main
from pipelines.worker import worker
from tests.demo_runs import RECIPE, small_demo
from tests.mlflow_stores import prepare_store
from tests.test_train import runs_of


class Reports(UserCallback):
    """Collect what a run reports, and end it after some reports, if that is wanted."""

    def __init__(
        self, *, last: int = 0, end: type[BaseException] = StoppedEarly
    ) -> None:
        self.seen: list[Mapping[str, Any]] = []
        self._last, self._end = last, end

    def after_report(self, run_context: Any, metrics: Any, checkpoint: Any) -> None:
        """Note the metrics of the only worker."""
        (of_worker,) = metrics
        self.seen.append(of_worker)
        if len(self.seen) == self._last:
            end(self._end)


class Ended(Exception):
    """Stand for SIGTERM where errors are listed."""


def end(error: type[BaseException]) -> None:
    """Raise an error, or send this process SIGTERM and see that it is noted."""
    if error is not Ended:
        raise error("as the test wants it")
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(1)  # the driver's thread looks twice a second


def run_in(folder: Path) -> Run:
    run = small_demo(folder, num_epochs=3, num_workers=0)
    prepare_store(run.storage)
    return dataclasses.replace(run, checkpoint_every_steps=4)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Make a run of three epochs of ten steps, a checkpoint every four steps."""
    return run_in(tmp_path)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """Train such a run to its end, on one thread; return its average's weights."""
    torch.set_num_threads(1)
    run = run_in(tmp_path_factory.mktemp("unbroken"))
    fit(run, name="unbroken", keep_model=False)
    return weights_of(run, "unbroken")


def weights_of(run: Run, name: str) -> dict[str, torch.Tensor]:
    return load_file(Path(run.storage, name, "epoch_0003", EMA_FILE))


def test_it_trains_keeps_and_records_as_workers_do(
    run: Run,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reports, had_ray = Reports(), ray.is_initialized()
    settings = {"deterministic": True, "matmul_precision": "high"}
    run = dataclasses.replace(run, scale=dataclasses.replace(run.scale, **settings))
    told = {"gpu": "pretended", "driver": "1.2", "precision": "float32"}
    monkeypatch.setattr(worker, "worker_facts", lambda device, precision: told)
    trained = fit(run, name="alone", callbacks=[reports])
    assert ray.is_initialized() == had_ray
    # Who called it computes as before.
    assert torch.get_float32_matmul_precision() == "highest"
    assert not torch.are_deterministic_algorithms_enabled()
    folder = Path(run.storage, "alone")
    kept = sorted(path.name for path in folder.iterdir() if path.is_dir())
    best = Path(str(trained.best)).name
    assert kept == sorted({best, "epoch_0003", "step_00000028"})
    top1s = {
        seen["epoch"]: seen["val/top1"] for seen in reports.seen if "epoch" in seen
    }
    assert best == f"epoch_{max(top1s, key=lambda epoch: top1s[epoch]):04d}"
    assert str(trained.checkpoint) == str(folder / "epoch_0003")
    manifest = read_manifest(folder / "epoch_0003")
    assert (manifest.position.epoch, manifest.position.step) == (3, 30)
    assert manifest.metrics == trained.metrics
    assert trained.metrics["val/num_images"] == 101

    assert [seen["epoch"] for seen in reports.seen if "epoch" in seen] == [1, 2, 3]
    assert [r.message for r in caplog.records if "of 4 tokens is pooled" in r.message]
    said = capsys.readouterr().out
    assert "steps are not compiled: --scale.compile auto" in said
    assert "steps compute in float32 on 1 x pretended" in said

    (tracked,) = runs_of(run.storage)
    assert tracked.data.tags["hardware.gpus"] == "1 x pretended"
    assert tracked.data.tags["version.nvidia-driver"] == "1.2"
    assert tracked.info.status == "FINISHED"
    assert tracked.data.metrics["val/top1"] == trained.metrics["val/top1"]
    with pytest.raises(ValueError, match="has finished"):
        read_record(run.storage, name="alone")


# What a run raises for what ended it, where that is another error.
RAISED: dict[type[BaseException], type[BaseException]] = {
    OSError: RunFailedError,
    Ended: InterruptedRun,
}


def end_early(run: Run, error: type[BaseException], status: str) -> None:
    """Train until the fifth report, a checkpoint within the second epoch; end there."""
    callbacks = [Reports(last=5, end=error)]
    with pytest.raises(
        RAISED.get(error, error), match=r"as the test wants it|--resume broken"
    ):
        fit(run, name="broken", callbacks=callbacks, keep_model=False)
    by_name = {tracked.info.run_name: tracked for tracked in runs_of(run.storage)}
    assert by_name["broken"].info.status == status


@pytest.mark.parametrize(
    ("error", "status"),
    [(StoppedEarly, "FINISHED"), (KeyboardInterrupt, "KILLED"), (OSError, "FAILED")],
)
def test_what_ended_a_run_is_recorded(
    run: Run, error: type[BaseException], status: str
) -> None:
    end_early(run, error, status)
    assert read_record(run.storage, name="broken").status == "running"


@pytest.mark.parametrize(
    ("error", "status"), [(ValueError, "FAILED"), (Ended, "KILLED")]
)
def test_what_ends_early_goes_on_to_the_same_weights(
    run: Run,
    unbroken: dict[str, torch.Tensor],
    error: type[BaseException],
    status: str,
) -> None:
    """Between epochs or within one: the weights are bit for bit."""
    torch.set_num_threads(1)
    end_early(run, error, status)

    record = read_record(run.storage, name="broken")
    reports = Reports()
    callbacks = [reports]
    fit(record.run, name="broken", record=record, callbacks=callbacks, keep_model=False)
    epochs = [seen["epoch"] for seen in reports.seen if "epoch" in seen]
    # Asked to end, it came to the second epoch's end.
    assert epochs == ([3] if error is Ended else [2, 3])
    found = weights_of(run, "broken")
    assert unbroken.keys() == found.keys()
    assert all(torch.equal(unbroken[name], found[name]) for name in unbroken)


def test_a_checkpoint_that_was_cut_off_is_passed_over(run: Run) -> None:
    with pytest.raises(StoppedEarly):
        fit(run, name="cut", callbacks=[Reports(last=4)])
    folder = Path(run.storage, "cut")
    (folder / "step_00000012" / MANIFEST).unlink()
    record = read_record(run.storage, name="cut")
    reports = Reports()
    callbacks = [reports]
    fit(record.run, name="cut", record=record, callbacks=callbacks, keep_model=False)
    # From the first epoch's end.
    assert [seen.get("epoch") for seen in reports.seen] == [
        None,
        None,
        2,
        None,
        None,
        3,
    ]


def test_a_run_that_was_cut_after_its_last_step_tells_what_it_came_to(run: Run) -> None:
    before = Reports(last=9)
    with pytest.raises(StoppedEarly):
        fit(run, name="last", callbacks=[before])
    record = read_record(run.storage, name="last")
    reports = Reports()
    trained = fit(record.run, name="last", record=record, callbacks=[reports])
    assert reports.seen == []
    assert trained.metrics == before.seen[-1]
    assert trained.metrics["epoch"] == 3


def test_asked_to_end_it_writes_a_checkpoint_first(run: Run) -> None:
    """By the next time that metrics are due, which is every five steps here."""
    reports = Reports(last=5, end=Ended)
    with pytest.raises(InterruptedRun, match="--resume ended"):
        fit(run, name="ended", callbacks=[reports])
    # After the fifth report, at step 16, the one that was not asked for at step 20.
    folder = Path(run.storage, "ended", "epoch_0002")
    assert read_manifest(folder).position.step == 20
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_the_same_command_begins_a_run_and_goes_on_with_it(
    run: Run, unbroken: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    (tmp_path / "run.json").write_text(to_json(run))
    (tmp_path / "recipe.py").write_text(RECIPE)
    command = [f"{tmp_path}/recipe.py:small", "--resume", "mine"]
    with pytest.raises(ValueError, match="expected a run to resume"):
        _main(["--resume", "mine", "--storage", run.storage])
    _main(command)
    assert weights_of(run, "mine").keys() == unbroken.keys()
    with pytest.raises(ValueError, match="has finished"):
        _main(command)


def test_a_run_goes_on_as_it_began_alone_or_not(run: Run) -> None:
    with pytest.raises(StoppedEarly):
        fit(run, name="mine", callbacks=[Reports(last=1)])
    resume = ["--resume", "mine", "--storage", run.storage]
    with pytest.raises(ValueError, match=r"scale\.num_workers: expected 0 again"):
        _main([*resume, "--scale.num-workers", "2"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_said_in_one_line(run: Run) -> None:
    scale = dataclasses.replace(run.scale, use_gpu=True)
    with pytest.raises(ValueError, match=r"expected a GPU for --scale\.use-gpu"):
        fit(dataclasses.replace(run, scale=scale), name="no-gpu")
