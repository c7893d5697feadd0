"""`python -m benchmarks.on_gpu` on a CPU: every stage, and stages that end badly."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from benchmarks.on_gpu import images, rates, ray_run
from benchmarks.on_gpu.__main__ import parse_options, stages_of, table
from benchmarks.on_gpu.profile import kernels
from benchmarks.on_gpu.runner import Outcome, run_stage, warm_up
from benchmarks.on_gpu.stages import STAGES, Setting, Stage
from benchmarks.result_file import write_result
from pipelines import train
from pipelines.config import Run
from tests.waiting import wait_for

ROOT = Path(__file__).parents[1]
# Stages that end badly are ended by limits, and machines are busy.
LONG_S, SHORT_S = 300.0, 8.0


def tiny_run(out: Path, *, part: str) -> dict[str, Any]:
    """Run a part of the script as a person would; give its results."""
    command = [sys.executable, "-m", "benchmarks.on_gpu", "--device", "cpu", "--tiny"]
    done = subprocess.run(
        [*command, "--part", part, "--out", str(out)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip().endswith((out / "table.txt").read_text().strip())
    assert len(list(out.iterdir())) <= 8
    return json.loads((out / "results.json").read_text())


def check_whole(result: dict[str, Any], *, part: str) -> dict[str, Any]:
    """Every stage of a part was run, and all its cases have figures; by stage."""
    found = result["stages"]
    assert list(found) == [stage.name for stage in STAGES if stage.part == part]
    assert result["missing"] == []
    for name, stage in found.items():
        assert stage["state"] == "done", (name, stage)
        assert stage["cases"], name
        assert stage["errors"] == {}, name
        for case, figures in stage["cases"].items():
            assert len(figures) > 1, (name, case)
    return {name: stage["cases"] for name, stage in found.items()}


def test_every_stage_without_ray_gives_its_figures(tmp_path: Path) -> None:
    found = check_whole(tiny_run(tmp_path / "out", part="a"), part="a")
    assert found["machine"]["device"]["device"] == "cpu"
    assert found["machine"]["copy"]["tb_per_s"] > 0
    assert found["marked"]["pytest -m gpu"]["skipped"] > 0
    decoded = [of for name, of in found["pixels"].items() if name.startswith("decoded")]
    assert len(decoded) == 6
    # DALI's decoder on a CPU is libjpeg-turbo, as Pillow's; its resize is its own.
    assert all(of["most"] == 0 for of in decoded)
    assert 0 < found["pixels"]["evaluation, engine 0.0"]["mean"] < 1
    by_kind = found["damaged"]
    bad = [of for name, of in by_kind.items() if name.startswith("bad")]
    odd = [of for name, of in by_kind.items() if name.startswith("odd")]
    assert all(of["training"].startswith("left out") for of in bad)
    assert all(of["training"] == "takes it" for of in odd)
    assert len(bad) > 1 < len(odd)
    for stage in ("steps", "compiled", "decoding", "end_to_end"):
        assert all(of["images_per_s"] > 0 for of in found[stage].values()), stage
    labels = {name.split(", ")[1] for name in found["steps"]}
    assert labels == {"plain", "eager", "bfloat16", "channels_last"}
    for of in found["end_to_end"].values():
        assert 0 <= of["waiting_share"] <= 1
        assert min(of["checkpoint_copy_ms"]) > 0
    share = found["heads"]["share of so_vit_7"]
    assert 0 < share["head_share"] < 1
    for of in found["profile"].values():
        assert of["num_kernels"] > 10
        assert of["most"]
    assert "aten::" in (tmp_path / "out" / "profile.txt").read_text()


@pytest.mark.ray
@pytest.mark.slow
def test_a_worker_on_ray_is_killed_and_goes_on(tmp_path: Path) -> None:
    """The rehearsal of part B: a Ray of its own and a training that restarts."""
    found = check_whole(tiny_run(tmp_path / "out", part="b"), part="b")
    assert found["collectives"]["all_reduce of one"]["backend"] == "gloo"
    run = found["ray_run"]["trained, killed, resumed"]
    assert run["next_epoch_after_kill_s"] > 0
    assert 0 <= found["ray_run"]["evaluated"]["top1"] <= 100


TRAINER = """
import pathlib, subprocess, sys, time
runs, num_epochs = pathlib.Path(sys.argv[1]), int(sys.argv[2])
code = "import time; time.sleep(600)"
for epoch in range(1, num_epochs + 1):
    if epoch <= 2:
        worker = subprocess.Popen(["RayTrainWorker", "-c", code],
                                  executable=sys.executable)
    if epoch == 2:
        assert died == -9, died
    folder = runs / f"epoch_{epoch:04d}"
    folder.mkdir(parents=True)
    (folder / "checkpoint.json").touch()
    if epoch == 1:
        died = worker.wait()
worker.kill()
"""


def stand_in(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *, script: str
) -> list[list[str]]:
    """Start a script where the stage would start a command of ours; what was asked."""
    asked: list[list[str]] = []
    monkeypatch.chdir(tmp_path)

    def start(module: str, *arguments: str) -> subprocess.Popen[bytes]:
        asked.append([module, *arguments])
        # From a file: the script's own words would make it look like a worker.
        Path("stand_in.py").write_text(script)
        folder = Path(value_of("--storage", arguments), value_of("--name", arguments))
        num_epochs = value_of("--optim.num-epochs", arguments)
        return subprocess.Popen(
            [sys.executable, "stand_in.py", str(folder), num_epochs],
            stdin=subprocess.DEVNULL,
        )

    monkeypatch.setattr(ray_run, "_start", start)
    return asked


def value_of(flag: str, arguments: Sequence[str]) -> str:
    return arguments[arguments.index(flag) + 1]


def test_the_worker_is_killed_once_the_first_epoch_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stage on a stand-in of the training; the real one is in a slow test."""
    asked = stand_in(monkeypatch, tmp_path, script=TRAINER)
    setting = Setting(device="cpu", tiny=True, work=tmp_path, out=tmp_path)
    figures = ray_run.tasks(setting)["trained, killed, resumed"]()
    assert figures["seconds_in_all"] >= figures["next_epoch_after_kill_s"] > 0
    assert not Path(f"/proc/{figures['killed']}").exists()
    ((module, *arguments),) = asked
    assert module == "pipelines.train"
    assert "--scale.no-use-gpu" in arguments
    # The real command takes these flags, and makes of them what the stage waits for.
    monkeypatch.setattr(train, "fit", lambda run, **_: given.append(run))
    monkeypatch.setattr(train, "print_summary", lambda *_, **__: None)
    given: list[Run] = []
    train._main(arguments)
    (run,) = given
    assert (run.scale.num_workers, run.optim.num_epochs) == (1, 5)


def test_a_training_that_ends_early_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch, tmp_path, script="raise SystemExit(3)")
    setting = Setting(device="cpu", tiny=True, work=tmp_path, out=tmp_path)
    with pytest.raises(RuntimeError, match=r"expected epoch_0001, .* 3"):
        ray_run.tasks(setting)["trained, killed, resumed"]()


def test_a_stage_that_cannot_start_is_told_and_the_next_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the process that all fork off has died, or memory has run out."""
    with monkeypatch.context() as patch:
        patch.setattr("multiprocessing.process.BaseProcess.start", raise_end)
        failed = run_one(bad_stage("raising"), work=tmp_path)
    assert (failed.state, failed.cases) == ("failed", {})
    assert failed.why == "its process did not start: EOFError"
    assert list(run_one(bad_stage("raising"), work=tmp_path).cases) == [
        "first",
        "third",
    ]


def raise_end(process: Any) -> None:
    raise EOFError("unexpected end")


def bad_stage(name: str, *, limit_s: float = LONG_S, needs: Any = ()) -> Stage:
    return Stage(name, "a", limit_s, needs, package="tests.stages")


def run_one(stage: Stage, *, work: Path, seconds: float = LONG_S) -> Outcome:
    setting = Setting(device="cpu", tiny=False, work=work, out=work)
    outcome, seen = Outcome(), []
    run_stage(
        stage,
        setting=setting,
        until_s=time.monotonic() + seconds,
        outcome=outcome,
        save=lambda: seen.append(copy.deepcopy(outcome)),
    )
    assert seen[-1] == outcome
    # What a case gave is kept before the next one ends.
    kept = [len(one.cases) for one in seen if one.state == "running"]
    assert kept == sorted(kept)
    assert set(kept) == set(range(len(outcome.cases) + 1))
    return outcome


def test_a_stage_that_ends_badly_leaves_what_it_has(tmp_path: Path) -> None:
    warm_up()
    raising = run_one(bad_stage("raising"), work=tmp_path)
    assert (raising.state, raising.why) == ("failed", "cases that failed: 1")
    assert raising.cases["first"]["value"] == 1.0
    assert raising.errors == {"second": "ValueError: expected a figure"}
    assert raising.cases["third"]["threads"] >= 1
    assert "about to fail" in raising.last_lines
    dying = run_one(bad_stage("dying"), work=tmp_path)
    assert (dying.state, dying.why) == ("failed", "its process ended with 3")
    assert dying.missing == ["die", "never"]
    assert dying.last_lines == ["the last words"]
    child = Path("/proc", str(dying.cases["start"]["child"]))
    wait_for(lambda: not child.exists(), what="the child's end", seconds=30)
    hanging = run_one(bad_stage("hanging", limit_s=SHORT_S), work=tmp_path)
    assert (hanging.state, hanging.missing) == ("out of time", ["endless"])
    assert hanging.cases["quick"]["value"] == 2
    assert hanging.last_lines == ["waiting for ever"]
    shown = table({"dying": dying, "hanging": hanging})
    assert "| the last words" in shown
    assert "not measured: endless" in shown


def test_what_is_missing_is_said_and_left_out(tmp_path: Path) -> None:
    lacking = Outcome()
    setting = Setting(device="cpu", tiny=True, work=tmp_path, out=tmp_path)
    needs = ("json", "nvidia.no_such", "no_such.part")
    for seconds, why in (
        (LONG_S, "needs nvidia.no_such, no_such.part"),
        (-1.0, "no time was left"),
    ):
        stage = bad_stage("raising", needs=needs if seconds > 0 else ())
        run_stage(
            stage,
            setting=setting,
            until_s=time.monotonic() + seconds,
            outcome=lacking,
            save=lambda: None,
        )
        assert (lacking.state, lacking.why) == ("left out", why)
    assert not lacking.cases


def test_pictures_are_made_up_where_photographs_are_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "photographs_here", list)
    setting = Setting(device="cpu", tiny=True, work=tmp_path, out=tmp_path)
    figures = images.tasks(setting)["photographs"]()
    assert figures["cut_from"] == "made-up pictures"
    assert figures["num_images"] == 8
    assert 50_000 < figures["mean_bytes"] < 200_000


def test_a_round_ends_though_the_host_is_far_ahead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device takes 20 ms a call, the host no time at all to ask for it."""
    asked: list[float] = []
    num_calls = 0

    def wait(device: Any) -> None:
        time.sleep(sum(asked))
        asked.clear()

    def ask() -> None:
        nonlocal num_calls
        num_calls += 1
        asked.append(0.02)

    monkeypatch.setattr(rates, "synchronize", wait)
    setting = Setting(device="cpu", tiny=False, work=tmp_path, out=tmp_path)
    found = rates.times_ms(ask, setting=setting, round_s=0.1)
    # Two to begin with, and five a round.
    assert 2 + setting.num_rounds <= num_calls <= 2 + 5 * setting.num_rounds
    assert found.low >= 20


def test_blocks_of_one_colour_are_counted() -> None:
    pytest.importorskip("nvidia.dali")
    from benchmarks.on_gpu.damaged import _flat_share

    pixels = np.random.default_rng(0).integers(0, 256, (20, 35, 3), dtype=np.uint8)
    assert _flat_share(pixels) == 0
    pixels[8:, :] = 128
    assert _flat_share(pixels) == 0.5
    assert _flat_share(np.asarray(Image.new("RGB", (7, 7)))) == 0


def test_kernels_count_where_there_are_any() -> None:
    def event(key: str, device: str, *, cpu: float, own: float) -> Any:
        return SimpleNamespace(
            key=key,
            device_type=SimpleNamespace(name=device),
            self_cpu_time_total=cpu,
            self_device_time_total=own,
            count=2,
        )

    on_cpu = event("aten::mm", "CPU", cpu=4000.0, own=9000.0)
    short = event("gemm", "CUDA", cpu=0.0, own=1000.0)
    long = event("flash", "CUDA", cpu=0.0, own=3000.0)
    assert kernels([on_cpu]) == [("aten::mm", 4.0, 2)]
    assert kernels([on_cpu, short, long]) == [("flash", 3.0, 2), ("gemm", 1.0, 2)]


def test_results_are_whole_or_as_before(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    write_result(path, {"value": 1}, missing=["two"])
    with pytest.raises(TypeError):
        write_result(path, {"value": object()}, missing=[])
    assert json.loads(path.read_text()) == {"value": 1, "missing": ["two"]}
    assert [file.name for file in tmp_path.iterdir()] == ["result.json"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--only nonsense", "invalid choice: 'nonsense'"),
        ("--limit-s 0", "expected --limit-s above 0, got 0"),
        ("--part c", "invalid choice: 'c'"),
    ],
)
def test_bad_options_say_what_was_expected(
    arguments: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_options(arguments.split())
    assert caught.value.code == 2
    assert said in capsys.readouterr().err


def test_stages_are_chosen() -> None:
    chosen = stages_of(parse_options(["--only", "heads", "steps"]))
    assert [stage.name for stage in chosen] == ["steps", "heads"]
    parts = {
        part: stages_of(parse_options(["--part", part])) for part in ("a", "b", "all")
    }
    assert parts["a"] + parts["b"] == parts["all"] == list(STAGES)
    assert len({dataclasses.astuple(stage) for stage in STAGES}) == len(STAGES)
