"""A training ends early: no better score for long, or its hours are over."""

from __future__ import annotations

import dataclasses
import math
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from pipelines.checkpoints.run_record import find_record, write_record
from pipelines.config import Run, Validation
from pipelines.config.overrides import change_fields
from pipelines.driver.fit import fit
from pipelines.driver.signals import StopRequest, stop_requests
from pipelines.errors import CHECKPOINTED, InterruptedRun
from pipelines.evaluation.in_training import InTrainingEvaluator
from pipelines.tracking import default_uri
from pipelines.training.state import TrainState
from pipelines.worker.early_stopping import EarlyStopping
from tests.fault_runs import brief_run
from tests.mlflow_stores import prepare_store
from tuning.checks import check_sweep
from tuning.trials.options import Search


def over_at(scores: list[float], *, patience: int, metric: Any = "top1") -> int:
    """Return the epoch after which a training with these scores ends; 0 for none."""
    stopping = EarlyStopping(Validation(metric=metric, patience_epochs=patience))
    for epoch, score in enumerate(scores, start=1):
        stopping.observe({f"val/{metric}": score}, epoch=epoch)
        if stopping.is_over(epoch):
            return epoch
    return 0


def test_epochs_without_a_better_score_are_counted() -> None:
    scores = [10.0, 30.0, 20.0, 30.0, 29.0, 31.0]
    assert over_at(scores, patience=0) == 0
    assert over_at(scores, patience=3) == 5  # as good is not better
    assert over_at(scores, patience=4) == 0
    assert over_at(scores, patience=2, metric="loss") == 3  # less is better
    assert over_at([math.nan] * 4, patience=2) == 2


def test_a_resumed_run_counts_from_its_best_checkpoint() -> None:
    validation = Validation(patience_epochs=2)
    stopping = EarlyStopping(validation, best_epoch=4, best_score=50.0)
    stopping.observe({"val/top1": 49.0}, epoch=5)
    assert not stopping.is_over(5)
    assert stopping.is_over(6)
    assert "val/top1 has not improved for 2 epochs, the best was in epoch 4" in (
        stopping.reason()
    )


def early_run(folder: Path, **changes: Any) -> Run:
    """Build a run of three short epochs in this process."""
    run = brief_run(folder, num_epochs=3)
    prepare_store(run.storage)
    return change_fields(run, {"validation.every_epochs": 1} | changes)


def test_a_run_that_does_not_improve_ends_as_finished_and_its_best_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate = InTrainingEvaluator.__call__

    def evaluated(self: InTrainingEvaluator, state: TrainState) -> dict[str, float]:
        best_first = {"val/top1": 100.0 - state.position.epoch}
        return evaluate(self, state) | best_first

    monkeypatch.setattr(InTrainingEvaluator, "__call__", evaluated)
    run = early_run(tmp_path, **{"validation.patience_epochs": 1})
    trained = fit(run, name="still")
    assert trained.metrics["epoch"] == 2
    assert trained.best is not None
    assert trained.best.name == "epoch_0001"
    assert trained.best_metrics["epoch"] == 1
    record = find_record(run.storage, name="still")
    assert record is not None
    assert record.status == "finished"
    assert mlflow_state(run, name="still") == ("FINISHED", "epoch_0001")

    # As where a worker was killed after that evaluation: no further epoch is trained.
    write_record(dataclasses.replace(record, status="running"))
    record = find_record(run.storage, name="still")
    again = fit(run, name="still", record=record, keep_model=False)
    assert again.metrics == trained.metrics


def mlflow_state(run: Run, *, name: str) -> tuple[str, str]:
    """Return a run's status and the checkpoint that was kept as its model."""
    client = MlflowClient(default_uri(run.storage))
    experiment = client.get_experiment_by_name(run.experiment)
    assert experiment is not None
    (found,) = client.search_runs([experiment.experiment_id])
    (model,) = client.search_logged_models([experiment.experiment_id])
    kept = Path(model.artifact_location.removeprefix("file://"))
    (weights,) = kept.rglob("model.safetensors")
    averages = Path(run.storage, name).glob("epoch_*/ema.safetensors")
    same = [file for file in averages if file.read_bytes() == weights.read_bytes()]
    return found.info.status, same[0].parent.name if same else ""


def test_a_run_ends_when_its_hours_are_over_and_goes_on(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = early_run(tmp_path, max_hours=1e-6)
    with pytest.raises(
        InterruptedRun, match=r"ended by --max-hours 1e-06 after a"
    ) as e:
        fit(run, name="brief")
    assert e.value.code == CHECKPOINTED
    assert "--resume brief" in str(e.value)
    assert "--max-hours 1e-06: writing a checkpoint" in capfd.readouterr().err
    record = find_record(run.storage, name="brief")
    assert record is not None
    trained = fit(dataclasses.replace(run, max_hours=0.0), name="brief", record=record)
    assert trained.metrics["epoch"] == 3


def test_time_asks_once_and_a_signal_soon_after_it_does_not_end_at_once() -> None:
    with stop_requests() as stop:
        stop.begun.set()
        with stop.noted() as is_over, stop.timed(1e-9):
            assert is_over.wait(5)
            assert stop.name == "--max-hours 1e-09"
            signal.raise_signal(signal.SIGTERM)
            assert stop.name == "SIGTERM"


def test_a_run_that_is_done_before_its_hours_leaves_no_timer() -> None:
    stop, before = StopRequest(), threading.active_count()
    with stop.timed(1.0):
        assert threading.active_count() == before + 1
    with stop.timed(0.0):
        pass
    assert not stop.event.is_set()


def test_what_can_not_end_early_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"got --validation\.no-held-out"):
        Validation(held_out=False, patience_epochs=1)
    with pytest.raises(ValueError, match=r"validation\.patience_epochs"):
        Validation(asynchronous=True, patience_epochs=1)
    run = early_run(tmp_path)
    with pytest.raises(ValueError, match="max_hours"):
        change_fields(run, {"max_hours": -1.0})
    with pytest.raises(ValueError, match="--max-gpu-hours"):
        check_sweep(change_fields(run, {"max_hours": 1.0}), search=Search())
