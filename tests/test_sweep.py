"""Sweeps on real parts: Ray Tune, Ray Train, MLflow.

Workers of Ray Train take a minute to start, so what does not need them is shown by
trials that train alone. The sweep that is killed begins in a process of its own with a
Ray of its own, beside the tests' Ray: helpers that mix up the two hang.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import pytest
import ray
from ray.actor import ActorClass
from ray.util import placement_group

from pipelines import tracking
from pipelines.checkpoints.manifest import opened, read_manifest
from pipelines.config.overrides import change_fields, differing
from pipelines.config.recipes import load_recipe
from pipelines.config.serialization import to_json
from pipelines.errors import RunFailedError
from pipelines.tracking.query import RunStore
from tests.demo_runs import RECIPE, small_demo
from tests.s3_server import s3_server
from tests.test_bucket_run import addresses
from tests.test_train import runs_of
from tests.waiting import wait_for
from tuning.search import _begun, _main, _split
from tuning.stage import live_actors, placement_groups, wait_until_free
from tuning.trials.ledger import Ledger, Sweep, TrialRecord, read_sweep, write_sweep

ROOT = Path(__file__).parents[1]
# Good, without end, and so small that nothing is learnt.
RATES = (2e-3, 1e30, 1e-9)
SPACE = f"""
from ray import tune
def rates(): return {{"optim.lr": tune.choice({list(RATES)})}}
def free(): return {{"optim.lr": tune.loguniform(1e-4, 1e-2)}}
def good_and_slow(): return {{"optim.lr": tune.choice({[RATES[0], RATES[2]]})}}
"""


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    """Give the arguments of a sweep of three trials, two epochs of a second each."""
    run = small_demo(tmp_path, num_epochs=2, num_workers=0)
    optim = dataclasses.replace(
        run.optim, ema_decay=0.0, warmup_epochs=0, mixup=0.0, cutmix=0.0
    )
    run = dataclasses.replace(run, optim=optim)
    (tmp_path / "run.json").write_text(to_json(run))
    (tmp_path / "recipe.py").write_text(RECIPE)
    (tmp_path / "space.py").write_text(SPACE)
    names = [f"{tmp_path}/recipe.py:small", f"{tmp_path}/space.py:rates"]
    options = "--name searched --method grid --metrics val/loss --modes min"
    return [*names, *options.split(), "--reduction-factor", "2"]


def killed_when(command: list[str], *, ledger_of: Path) -> None:
    """Begin a sweep, and kill it by signal once a trial has finished."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tuning.search", *command, "--num-concurrent", "1"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )

    def one_has_finished() -> bool:
        assert process.poll() is None, process.communicate()[0]
        texts = (file.read_text() for file in ledger_of.glob("*.json"))
        return any('"finished"' in text for text in texts)

    try:
        wait_for(one_has_finished, what="the first trial's end")
    finally:
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
        process.wait()


def as_ended(entries: Iterable[TrialRecord]) -> list[TrialRecord]:
    """Give trials without their MLflow runs: a kill may come before they are noted."""
    return [dataclasses.replace(entry, mlflow_run_id="") for entry in entries]


def by_rate(entries: tuple[TrialRecord, ...]) -> dict[float, TrialRecord]:
    return {entry.setting["optim.lr"]: entry for entry in entries}


@pytest.mark.ray
def test_a_killed_sweep_goes_on_to_its_end(
    ray_local: None,
    tmp_path: Path,
    command: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    storage = str(tmp_path / "runs")
    killed_when(command, ledger_of=tmp_path / "runs/searched/full")
    before = Ledger(read_sweep(storage, name="searched"), stage="full")
    ended = {entry.number: entry for entry in before.entries if entry.has_ended}
    assert 0 < len(ended) < len(RATES)
    groups = placement_groups()

    _main(["--resume", "searched", "--storage", storage])

    sweep = read_sweep(storage, name="searched")
    found = Ledger(sweep, stage="full")
    assert [entry.setting["optim.lr"] for entry in found.entries] == list(RATES)
    assert as_ended(found[number] for number in ended) == as_ended(ended.values())
    trials = by_rate(found.entries)
    assert trials[1e30].status == "diverged"
    assert "finite" in trials[1e30].reason
    assert trials[2e-3].status == "finished"
    assert trials[1e-9].status == "stopped"
    assert trials[1e-9].epoch == 1
    assert placement_groups() <= groups
    assert ray.is_initialized()

    said = capsys.readouterr().out
    assert "diverged" in said.lower()
    check_mlflow(storage, entries=found.entries)
    check_report(tmp_path, entries=found.entries, storage=storage)


def check_mlflow(storage: str, *, entries: tuple[TrialRecord, ...]) -> None:
    """One parent, and below it each trial once, with what it came to."""
    store = RunStore(tracking.default_uri(storage))
    children = store.find(["searched"])
    assert len(children) == len(entries)
    (parent,) = {run.tags["mlflow.parentRunId"] for run in children}
    everything = runs_of(storage)
    assert len(everything) == len(children) + 1
    (sweep,) = [run for run in everything if run.info.run_id == parent]
    assert sweep.info.status == "FINISHED"
    assert sweep.data.tags["sovit.kind"] == "sweep"
    assert sweep.data.metrics["num_diverged"] == 1
    by_id = {run.run_id: run for run in children}
    for entry in entries:
        run = by_id[entry.mlflow_run_id]
        assert run.tags["sovit.outcome"] == entry.status
        bad = entry.status == "diverged"
        assert run.status == ("FAILED" if bad else "FINISHED")
        assert float(run.params["optim.lr"]) == entry.setting["optim.lr"]
        if entry.reports:
            assert run.metrics["val/loss"] == pytest.approx(entry.last("val/loss"))
            assert run.metrics["epoch"] == entry.epoch


def check_report(
    folder: Path, *, entries: tuple[TrialRecord, ...], storage: str
) -> None:
    """The winner is the best of those that finished, and can be trained as it is."""
    report = Path(storage) / "searched" / "report"
    names = {file.name for file in report.iterdir()}
    wanted = {"trials.txt", "trials.csv", "winner.py", "parallel_coordinates.png"}
    assert wanted <= names
    best = load_recipe(f"{report}/winner.py:best")
    finished = [entry for entry in entries if entry.status == "finished"]
    least = min(finished, key=lambda entry: entry.last("val/loss") or 0.0)
    given = load_recipe(f"{folder}/recipe.py:small")
    expected = change_fields(given, least.setting)
    assert set(differing(expected, best)) <= {"recipe", "num_checkpoints_to_keep"}


@pytest.mark.ray
def test_what_a_dead_controller_left_held_is_removed(ray_local: None) -> None:
    """Ray keeps an actor's placement group for as long as its driver lives."""

    class Controller:
        def start_workers(self) -> bool:
            return placement_group([{"CPU": 0.1}]).wait(60)

    before = live_actors() | placement_groups()
    controller: Any = cast(ActorClass, ray.remote(num_cpus=0)(Controller)).remote()
    assert ray.get(controller.start_workers.remote())
    ray.kill(controller)
    wait_for(lambda: live_actors() <= before, what="the controller's end")
    assert placement_groups() - before, "Ray removes it: the sweep need not any more"
    wait_until_free(before)
    assert placement_groups() <= before


@pytest.mark.ray
def test_trials_on_workers_are_stopped_and_leave_nothing(
    ray_local: None,
    tmp_path: Path,
    command: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What Ray Train holds for a trial is free once asha has stopped it.

    Sweep and checkpoints lie in a bucket.
    """
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with s3_server():
        storage, checkpoint = addresses("runs", "runs/searched-0000/epoch_0002")
        recipe, _, *options = command
        command = [recipe, f"{tmp_path}/space.py:good_and_slow", *options]
        groups = placement_groups()
        scale = ["--scale.num-workers", "1", "--num-concurrent", "1"]
        _main([*command, *scale, "--storage", storage])
        found = Ledger(read_sweep(storage, name="searched"), stage="full")
        assert [(entry.status, entry.epoch) for entry in found.entries] == [
            ("finished", 2),
            ("stopped", 1),
        ]
        assert placement_groups() <= groups
        with opened(checkpoint) as folder:
            assert read_manifest(folder).position.epoch == 2
        (parent, *children) = sorted(
            runs_of(storage), key=lambda run: "mlflow.parentRunId" in run.data.tags
        )
        assert {run.info.status for run in children} == {"FINISHED"}
        assert {run.data.tags["mlflow.parentRunId"] for run in children} == {
            parent.info.run_id
        }


@pytest.mark.ray
def test_a_budget_ends_a_search_for_smooth_losses_that_goes_on_with_more(
    ray_local: None, tmp_path: Path, command: list[str], capsys: pytest.CaptureFixture
) -> None:
    """Optuna looks for accuracy and a smooth loss; the probes come to MLflow too."""
    recipe, *_ = command
    search = "--name smooth --method optuna --num-trials 4 --num-concurrent 1"
    wanted = "--metrics val/top1 probe/loss_variation --modes max min"
    probes = "--probe.every-steps 5 --probe.num-step-sizes 3"
    short = "--scheduler none --optim.num-epochs 1 --max-gpu-hours 1e-6"
    options = f"{search} {wanted} {probes} {short}".split()
    with pytest.raises(RunFailedError, match="too few; raise --max-gpu-hours"):
        _main([recipe, f"{tmp_path}/space.py:free", *options])
    storage = str(tmp_path / "runs")
    first = Ledger(read_sweep(storage, name="smooth"), stage="full").entries
    assert len(first) < 4
    assert "--max-gpu-hours MORE" in capsys.readouterr().out

    _main(["--resume", "smooth", "--storage", storage, "--max-gpu-hours", "1"])
    found = Ledger(read_sweep(storage, name="smooth"), stage="full").entries
    assert [entry.status for entry in found] == ["finished"] * 4
    assert [entry.setting for entry in found[: len(first)]] == [
        entry.setting for entry in first
    ]
    assert len({entry.setting["optim.lr"] for entry in found}) == 4
    children = [run for run in runs_of(storage) if "sovit.outcome" in run.data.tags]
    assert len(children) == 4
    for entry in found:
        variation = entry.last("probe/loss_variation")
        assert variation is not None
        assert variation > 0
    by_number = sorted(children, key=lambda run: run.info.run_name)
    assert [run.data.metrics["probe/loss_variation"] for run in by_number] == [
        pytest.approx(entry.last("probe/loss_variation")) for entry in found
    ]
    assert (tmp_path / "runs/smooth/report/pareto.png").exists()


def refused(arguments: list[str], *, said: str) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        _main(arguments)
    assert "\n" not in str(caught.value)


def test_what_can_not_begin_is_refused_and_leaves_nothing(
    tmp_path: Path, command: list[str]
) -> None:
    recipe, _, *options = command
    cases: list[tuple[list[str], str]] = [
        ([], "a recipe and a space"),
        ([recipe, "", *options], "got an empty one"),
        ([recipe, "nix", *options], "there are heads, iterations"),
        ([*command, "--optim.num-epochs", "1"], "asha"),
        (
            [*command, "--num-concurrent", "99"],
            r"99 trials at a time.*--num-concurrent",
        ),
        ([*command, "--method", "random", "--num-trials", "9"], "a space of 3"),
        (["--resume", "nix", "--storage", str(tmp_path)], "a sweep to go on with"),
        ([*command, "--validation.every-epochs", "2"], "evaluated after each epoch"),
        ([*command, "--data.train", str(tmp_path / "nix")], "not there"),
    ]
    for arguments, said in cases:
        refused(arguments, said=said)
    assert not (tmp_path / "runs").exists()


def test_a_deleted_experiment_and_a_lost_store_are_one_line_each(
    ray_local: None, tmp_path: Path, command: list[str]
) -> None:
    from mlflow import MlflowClient

    uri = tracking.default_uri(str(tmp_path / "runs"))
    tracking.open_run(uri, experiment="sovit", name="old", params={}, tags={})
    client = MlflowClient(uri)
    experiment: Any = client.get_experiment_by_name("sovit")
    client.delete_experiment(experiment.experiment_id)
    refused(command, said="mlflow experiments restore")
    assert not (tmp_path / "runs/searched").exists()

    client.restore_experiment(experiment.experiment_id)
    lost = dataclasses.replace(a_sweep(command), mlflow_run_id="f" * 32)
    write_sweep(lost)
    refused(
        ["--resume", "searched", "--storage", str(tmp_path / "runs")],
        said="got a store without it; put the store back",
    )


def a_sweep(command: list[str]) -> Sweep:
    """Describe the sweep that the command would begin."""
    sweep, _ = _begun(*_split(command))
    return sweep
