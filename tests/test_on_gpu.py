"""`python -m benchmarks.on_gpu` on a CPU: every stage, and stages that end badly."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.on_gpu import __main__ as on_gpu
from benchmarks.on_gpu import setting
from benchmarks.on_gpu.setting import Setting
from benchmarks.rounds import write_result

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


def test_every_stage_gives_its_figures(tmp_path: Path) -> None:
    """Run the script as a person would."""
    out = tmp_path / "out"
    done = run_python(
        *("-m", "benchmarks.on_gpu", "--device", "cpu", "--tiny", "--out", str(out))
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, dict[str, Any]] = {}
    for name in on_gpu.STAGES:
        stage = json.loads((out / f"{name}.json").read_text())
        assert (stage["missing"], stage["errors"]) == ([], {}), name
        assert stage["rounds"], name
        assert stage["machine"]["versions"]["torch"], name
        for of in stage["rounds"]:
            assert len(of) > 4, (name, of)
            assert f"\n{of['case']} " in done.stdout, (name, of)
        found[name] = {of["case"]: of for of in stage["rounds"]}
    assert len(list(out.iterdir())) == len(found)
    decoded = [of for name, of in found["pixels"].items() if name.startswith("decoded")]
    assert len(decoded) == 6
    # DALI's decoder on a CPU is libjpeg-turbo, as Pillow's; its resize is its own.
    assert all(of["most"] == 0 for of in decoded)
    assert 0 < found["pixels"]["evaluation, engine 0.0"]["mean"] < 1
    by_kind = found["damaged"]
    bad = [of for name, of in by_kind.items() if name.startswith("bad")]
    odd = [of for name, of in by_kind.items() if name.startswith("odd")]
    assert len(bad) > 1 < len(odd)
    assert any(of["engine_0"] == "refuses it" for of in bad)
    assert all("mean distance to Pillow 0.00" in of["engine_0"] for of in odd)
    assert len(found["decoding"]) == 5
    assert all(of["images_per_s"] > 0 for of in found["decoding"].values())


def test_the_stages_asked_for_run_and_their_failures_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    begun: list[str] = []

    def import_module(name: str) -> Any:
        begun.append(name.rpartition(".")[2])
        broken = {f"{begun[-1]} of it": lambda: {}["figure"]}
        fine = {"fine": lambda: {"value": 1.0}}
        tasks = broken if begun[-1] == "damaged" else fine
        return SimpleNamespace(tasks=lambda setting: tasks)

    monkeypatch.setattr(on_gpu.importlib, "import_module", import_module)
    settings = ["--device", "cpu", "--out", str(tmp_path)]
    assert on_gpu.main([*settings, "--only", "decoding", "pixels"]) == 0
    assert begun == ["pixels", "decoding"]
    assert on_gpu.main(settings) == 1
    assert begun[2:] == list(on_gpu.STAGES)
    assert (
        "benchmarks.on_gpu: damaged: expected figures of all cases"
        in capsys.readouterr().err
    )


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

    monkeypatch.setattr(setting, "synchronize", wait)
    full = Setting(device=CPU, tiny=False, work=tmp_path)
    found = setting.times_ms(ask, setting=full, round_s=0.1)
    # Two calls warm up before each measurement: one of a call, three rounds of five.
    assert 3 + 3 * 3 <= num_calls <= 3 + 3 * 7
    assert min(found) >= 20


def test_blocks_of_one_colour_are_counted() -> None:
    pytest.importorskip("nvidia.dali")
    from benchmarks.on_gpu.damaged import _flat_share

    pixels = np.random.default_rng(0).integers(0, 256, (20, 35, 3), dtype=np.uint8)
    assert _flat_share(pixels) == 0
    pixels[8:, :] = 128
    assert _flat_share(pixels) == 0.5
    assert _flat_share(np.asarray(Image.new("RGB", (7, 7)))) == 0


def test_results_are_whole_or_as_before(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    write_result(path, {"value": 1}, missing=["two"])
    with pytest.raises(TypeError):
        write_result(path, {"value": object()}, missing=[])
    assert json.loads(path.read_text()) == {"value": 1, "missing": ["two"]}
    assert [file.name for file in tmp_path.iterdir()] == ["result.json"]


def test_an_unknown_stage_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        on_gpu.parse_options(["--only", "nonsense"])
    assert caught.value.code == 2
    assert "invalid choice: 'nonsense'" in capsys.readouterr().err
