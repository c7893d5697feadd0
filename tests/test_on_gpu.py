"""`python -m benchmarks.on_gpu` on a CPU: every stage, and stages that end badly."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.on_gpu import __main__ as on_gpu
from benchmarks.on_gpu import images, setting
from benchmarks.on_gpu.setting import Setting
from benchmarks.result_file import write_result

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
    for name in on_gpu.LIMITS_S:
        stage = json.loads((out / f"{name}.json").read_text())
        assert (stage["missing"], stage["errors"]) == ([], {}), name
        assert stage["cases"], name
        assert stage["machine"]["versions"]["torch"], name
        for case, figures in stage["cases"].items():
            assert len(figures) > 1, (name, case)
            assert f"  {case}  " in done.stdout, (name, case)
        found[name] = stage["cases"]
    assert len(list(out.iterdir())) == len(found) + 1
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
    for stage in ("decoding", "end_to_end"):
        assert all(of["images_per_s"] > 0 for of in found[stage].values()), stage
    for of in found["end_to_end"].values():
        assert 0 <= of["waiting_share"] <= 1
        assert min(of["checkpoint_copy_ms"]) > 0
    assert (out / "profile.txt").read_text().count("aten::") > 10


FAILING = """
import sys, time, pathlib
from benchmarks.on_gpu.__main__ import measure
def fail(): raise ValueError("expected a figure")
def hang(): time.sleep(600)
tasks = {"first": lambda: {"value": 1.0}, "second": fail, "third": lambda: {"of": [2]}}
limit_s = 300
if sys.argv[2:]:
    tasks["endless"], limit_s = hang, 8
sys.exit(measure(tasks, file=pathlib.Path(sys.argv[1]), limit_s=limit_s))
"""


@pytest.mark.parametrize("hangs", [False, True])
def test_a_stage_that_ends_badly_leaves_what_it_has(
    hangs: bool, tmp_path: Path
) -> None:
    file = tmp_path / "stage.json"
    done = run_python("-c", FAILING, str(file), *["hang"] * hangs)
    assert done.returncode == (-signal.SIGALRM if hangs else 1)
    found = json.loads(file.read_text())
    assert found["cases"]["first"]["value"] == 1.0
    assert found["cases"]["third"]["of"] == [2]
    assert found["errors"] == {"second": "ValueError: expected a figure"}
    assert found["missing"] == ["endless"] * hangs
    assert "second  FAILED  ValueError: expected a figure" in done.stdout
    assert "in fail\nValueError: expected a figure" in done.stderr


def test_a_stage_that_ends_badly_is_named_and_the_next_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    codes = iter([0, 1, -signal.SIGALRM, -signal.SIGKILL])
    stages: list[list[str]] = []

    def run(command: list[str], **_: Any) -> Any:
        stages.append(command)
        return subprocess.CompletedProcess(command, next(codes))

    monkeypatch.setattr(on_gpu.subprocess, "run", run)
    assert on_gpu.main(["--tiny", "--out", str(tmp_path)]) == 1
    assert (
        "damaged ended with 1; decoding ran out of time; end_to_end ended with -9"
        in (capsys.readouterr().err)
    )
    read = [on_gpu.parse_options(command[3:]) for command in stages]
    assert [of.stage for of in read] == list(on_gpu.LIMITS_S)
    assert {(of.tiny, of.out) for of in read} == {(True, tmp_path)}


def test_pictures_are_made_up_where_photographs_are_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "photographs_here", list)
    tiny = Setting(device=CPU, tiny=True, work=tmp_path, out=tmp_path)
    found = images.encoded_images(tiny)
    assert len(found) == 8
    assert 50_000 < np.mean([len(image) for image in found]) < 200_000


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
    full = Setting(device=CPU, tiny=False, work=tmp_path, out=tmp_path)
    found = setting.times_ms(ask, setting=full, round_s=0.1)
    # Two to begin with, and five a round.
    assert 2 + full.num_rounds <= num_calls <= 2 + 5 * full.num_rounds
    assert found.low >= 20


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


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--only nonsense", "invalid choice: 'nonsense'"),
        ("--limit-s 0", "expected --limit-s above 0, got 0"),
    ],
)
def test_bad_options_say_what_was_expected(
    arguments: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        on_gpu.parse_options(arguments.split())
    assert caught.value.code == 2
    assert said in capsys.readouterr().err
