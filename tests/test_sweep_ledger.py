"""A sweep's folder: written as it comes, read again whole, and what watches it."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from recipes.demo import demo
from tuning.budget import Budget
from tuning.trials.head_trial import HEAD_METRIC, promoted, rank_pairs
from tuning.trials.ledger import Ledger, Sweep, TrialRecord, read_sweep, write_sweep
from tuning.trials.options import Search
from tuning.trials.trial import bad_end, config_of
from tuning.watch import TrialRecorder


def trial_of(entry: TrialRecord) -> Any:
    """Stand for Tune's trial: only its configuration is looked at."""
    return SimpleNamespace(config=config_of(entry.number, entry.setting))


def a_sweep(folder: Path, **search: Any) -> Sweep:
    return Sweep(
        name="searched",
        recipe="demo",
        run=dataclasses.replace(demo(), storage=str(folder)),
        space="pooling",
        domains={"pooling.power": "uniform (0.3, 0.9)"},
        search=Search(**search),
    )


def a_ledger(folder: Path, *, num_trials: int = 3, **search: Any) -> Ledger:
    ledger = Ledger(a_sweep(folder, **search), stage="full")
    for number in range(num_trials):
        setting = {"pooling.power": 0.1 + number / 10, "pooling.reduced_dim": (8, 4)}
        ledger.put(TrialRecord(number=number, setting=setting))
    return ledger


def report(epoch: int, value: float) -> dict[str, Any]:
    """Give what Tune hands on of an epoch, with things of its own."""
    own = {"training_iteration": epoch, "config": {"a/b": 1}, "time_total_s": 1.0}
    return {"epoch": epoch, "val/top1": value, "checkpoint_path": "a/b"} | own


def test_a_sweep_is_read_as_it_was_written(tmp_path: Path) -> None:
    sweep = a_sweep(tmp_path, metrics=("val/top1", "train/loss"), modes=("max", "min"))
    write_sweep(sweep)
    assert read_sweep(str(tmp_path), name="searched") == sweep
    ledger = a_ledger(tmp_path)
    ledger.change(1, status="stopped", reports=({"epoch": 1.0, "val/top1": 9.0},))
    assert Ledger(sweep, stage="full").entries == ledger.entries
    assert Ledger(sweep, stage="head").entries == ()


def test_what_can_not_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no sweep\.json"):
        read_sweep(str(tmp_path), name="searched")
    write_sweep(a_sweep(tmp_path))
    a_ledger(tmp_path)
    (tmp_path / "searched/full/0001.json").write_text("{")
    with pytest.raises(ValueError, match=r"0001\.json.*made again"):
        Ledger(a_sweep(tmp_path), stage="full")
    (tmp_path / "searched/sweep.json").write_text('{"run": 3}')
    with pytest.raises(ValueError, match="as this version writes it"):
        read_sweep(str(tmp_path), name="searched")


def watched(ledger: Ledger) -> tuple[TrialRecorder, list[TrialRecord]]:
    ended: list[TrialRecord] = []
    watch = TrialRecorder(
        ledger, metric="val/top1", num_epochs=2, num_trials=3, on_end=ended.append
    )
    return watch, ended


def test_trials_end_as_they_should(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ledger = a_ledger(tmp_path)
    watch, ended = watched(ledger)
    whole, stopped, bad = (trial_of(entry) for entry in ledger.entries)
    event: dict[str, Any] = {"iteration": 0, "trials": []}
    for trial in (whole, stopped, bad):
        watch.on_trial_start(trial=trial, **event)
    for trial, epoch, value in [(whole, 1, 50), (stopped, 1, 20), (whole, 2, 60)]:
        watch.on_trial_result(trial=trial, result=report(epoch, value), **event)
    # An epoch that is told again, after a restart, is no other epoch.
    watch.on_trial_result(trial=whole, result=report(2, 61), **event)
    end = bad_end(ValueError("too wide"), metrics=("val/top1",))
    watch.on_trial_result(trial=bad, result=end, **event)
    for trial in (stopped, whole, bad):
        watch.on_trial_complete(trial=trial, **event)
        watch.on_trial_complete(trial=trial, **event)
    watch.close()

    again = Ledger(ledger.sweep, stage="full")
    assert [entry.status for entry in again.entries] == [
        "finished",
        "stopped",
        "refused",
    ]
    assert again[0].reports == (
        {"epoch": 1.0, "val/top1": 50.0},
        {"epoch": 2.0, "val/top1": 60.0},
    )
    assert again[2].reason == "too wide"
    assert [entry.number for entry in ended] == [1, 0, 2]
    assert "trial 1 stopped  val/top1 20" in capsys.readouterr().out


def test_a_trial_that_dies_is_tried_again_and_then_marked(tmp_path: Path) -> None:
    ledger = a_ledger(tmp_path, num_trials=1)
    watch, ended = watched(ledger)
    trial: Any = trial_of(ledger[0])
    event: dict[str, Any] = {"iteration": 0, "trials": [], "trial": trial}
    watch.on_trial_start(**event)
    watch.on_trial_recover(**event)
    assert ledger[0].status == "running"
    assert ledger[0].reason == "its process died"
    watch.on_trial_start(**event)
    end = bad_end(RuntimeError("no memory"), metrics=("val/top1",))
    watch.on_trial_result(result=end, **event)
    watch.on_trial_error(**event)
    assert (ledger[0].status, ledger[0].num_attempts) == ("failed", 2)
    assert ledger[0].reason == "RuntimeError: no memory"
    assert len(ended) == 1


def test_the_budget_counts_what_was_spent_before_a_stop(tmp_path: Path) -> None:
    ledger = a_ledger(tmp_path)
    ledger.change(0, status="finished", seconds=3600.0)
    ledger.change(1, status="running", seconds=1800.0)
    watch, _ = watched(ledger)
    spent = watch.device_hours(num_devices=2)
    assert spent == pytest.approx(3.0)
    assert Budget(3.0, spent=lambda: spent).stop_all()
    assert not Budget(3.1, spent=lambda: spent).stop_all()
    assert not Budget(0.0, spent=lambda: spent).stop_all()


def test_the_best_heads_are_promoted_and_some_of_the_others() -> None:
    def head(number: int, value: float, status: Any = "finished") -> TrialRecord:
        reports = ({"epoch": 1.0, HEAD_METRIC: value},)
        return TrialRecord(number=number, setting={}, status=status, reports=reports)

    heads = [head(n, v) for n, v in enumerate([5.0, 9.0, 7.0, 1.0, 3.0, 8.0])]
    heads.append(head(6, 99.0, status="diverged"))

    def chosen(**search: Any) -> list[int]:
        return [entry.number for entry in promoted(heads, search=Search(**search))]

    assert chosen(num_promoted=2) == [1, 5]
    assert chosen(num_promoted=2, num_spread=2) == [1, 2, 3, 5]
    assert chosen(num_promoted=9) == [0, 1, 2, 3, 4, 5]

    sweep = a_sweep(Path("none"))
    full = TrialRecord(
        number=1,
        setting={},
        status="finished",
        reports=({"epoch": 8.0, "val/top1": 80.0},),
    )
    assert rank_pairs(heads, [full], sweep=sweep) == ([9.0], [80.0], [1])


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"num_trials": 0}, "num_trials"),
        ({"metrics": ("a", "a"), "modes": ("max", "max")}, "none twice"),
        ({"metrics": ("a", "b")}, "max or min for each"),
        ({"reduction_factor": 1.0}, "above 1"),
        ({"max_gpu_hours": -1.0}, "max_gpu_hours"),
    ],
)
def test_a_search_that_can_not_be_is_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Search(**fields)


def test_no_value_is_no_number() -> None:
    end = bad_end(RuntimeError("gone"), metrics=("a", "b"))
    assert math.isnan(end["a"])
    assert math.isnan(end["b"])
    assert end["outcome"] == "failed"
