"""`python -m benchmarks.model`: equal work, each stage as it says, figures that fit."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from timm.utils.model_ema import ModelEmaV3

from benchmarks import model, model_steps
from benchmarks.model import Options, cases_of, mfu, table
from benchmarks.model_cases import (
    RIVALS,
    STAGES,
    Case,
    build_steps,
    make_contiguous,
    run_of,
)
from benchmarks.model_steps import matrix_rate, size_of, time_steps
from pipelines.hardware.device import has_bfloat16
from pipelines.training import step
from pipelines.training.state import build_state

CASE = Case(
    model="so_vit_7",
    subject="ours",
    stage="eager",
    batch_size=2,
    img_size=32,
    device="cpu",
    num_threads=1,
)


def changed(**fields: Any) -> Case:
    return dataclasses.replace(CASE, **fields)


@pytest.mark.parametrize("name", RIVALS)
def test_what_stands_beside_is_of_equal_size(name: str) -> None:
    ours, class_token, other = (
        size_of(changed(model=name, subject=subject, img_size=224))
        for subject in ("ours", "class", "timm")
    )
    assert 0.8 < other["num_params"] / ours["num_params"] < 1.2
    assert class_token["num_params"] < ours["num_params"]
    # The head costs parameters, and next to no products.
    assert 0.97 < class_token["macs"] / ours["macs"] < 1


def test_each_stage_is_what_it_says() -> None:
    for name in STAGES:
        scale = run_of(changed(stage=name)).scale
        assert scale.compile == (name == "compile")
        assert scale.grad_checkpointing == (name == "checkpointing")
        assert (scale.amp == "off") == (name in ("plain", "eager"))
    half = torch.bfloat16 if has_bfloat16(torch.device("cpu")) else torch.float32
    assert changed(stage="compile").dtype == half
    assert changed(stage="eager").dtype == torch.float32
    assert changed(stage="plain").dtype == torch.float32
    assert changed(stage="plain", device="cuda").dtype == torch.float16


def test_channels_last_is_undone_where_a_stage_has_none() -> None:
    state = build_state(run_of(CASE), num_classes=3, device=torch.device("cpu"))
    weight = state.model.get_parameter("patch_embed.stem.weight")
    before = weight.detach().clone()
    assert not weight.is_contiguous()
    make_contiguous(state.model)
    assert weight.is_contiguous()
    assert torch.equal(weight, before)


@pytest.mark.parametrize("stage", ["plain", "eager"])
def test_the_steps_train(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both: forward, backward, optimiser and average are all there."""
    seen: list[str] = []

    def note(name: str, owner: Any, method: str) -> None:
        real = getattr(owner, method)

        def noted(*args: Any, **kwargs: Any) -> Any:
            seen.append(name)
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, method, noted)

    note("forward", torch.nn.LayerNorm, "forward")
    note("backward", torch.Tensor, "backward")
    note("optimiser", torch.optim.AdamW, "step")
    note("average", ModelEmaV3, "update")
    note("average", step, "update_average")
    build_steps(changed(stage=stage))(2)
    once = [name for name in seen if name != "forward"]
    assert once == ["backward", "optimiser", "average"] * 2
    # Two norms a block and one at the end.
    assert seen.count("forward") == 2 * (2 * 7 + 1)


def test_memory_is_measured_before_and_during_a_step() -> None:
    size = 64 * 2**20
    kept: list[Any] = []

    def steps(num: int) -> None:
        kept.append(torch.ones(size // 4))
        kept.clear()

    found = model_steps.memory_mb(steps, device="cpu")
    assert 60 < found["peak_mb"] - found["at_rest_mb"] < 80
    assert found["at_rest_mb"] > 100  # Python with torch


def test_a_case_begins_once_and_then_takes_rounds() -> None:
    first, second = (time_steps(CASE, round_s=0) for _ in range(2))
    assert first["first_step_s"] == second["first_step_s"] > 0
    assert first["peak_mb"] >= first["at_rest_mb"] > 0
    assert first["num_steps"] == 1
    for found in (first, second):
        assert found["images_per_s"] == 1000 * CASE.batch_size / found["step_ms"] > 0


def test_mfu_counts_three_forward_passes_against_the_measured_rate() -> None:
    # 10 images/s of 5 G multiply-adds are 300 GFLOP/s.
    assert mfu(10, macs=5 * 10**9, rate=1e12) == pytest.approx(0.3)


def test_the_best_rate_of_matrix_products_counts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spent_ms = iter([2.0, 1.0, 4.0])
    monkeypatch.setattr(model_steps, "_SIDES", {"cpu": (16, 32)})
    monkeypatch.setattr(model_steps, "_MATRIX_S", 0.003)
    monkeypatch.setattr(model_steps, "call_ms", lambda of, device: next(spent_ms))
    rate = matrix_rate(torch.bfloat16, device="cpu")["flops_per_s"]
    assert rate == 2 * 32**3 / 0.004


def rounds_of(case: str, *times_ms: float) -> list[dict[str, Any]]:
    memory = {"at_rest_mb": 300.0, "peak_mb": 420.0, "first_step_s": 1.0}
    times = [{"step_ms": ms, "images_per_s": 2000 / ms} for ms in times_ms]
    return [{"round": n, "case": case, **of, **memory} for n, of in enumerate(times)]


def test_cases_are_compared_round_by_round(monkeypatch: pytest.MonkeyPatch) -> None:
    size = {"num_params": 6 * 10**6, "macs": 10**9}
    monkeypatch.setattr(model, "size_of", lambda case: size)
    plain, other = changed(stage="plain"), changed(subject="timm")
    cases = {"plain": plain, "eager": CASE, "other": other}
    rates = [{"case": "products of matrices, float32", "flops_per_s": 1e12}]
    records = [
        *rates,
        *rounds_of("plain", 100, 300, 200),
        *rounds_of("eager", 50, 100, 200),
        *rounds_of("other", 25, 50),
    ]
    head, *lines, rate = table(pd.DataFrame(records), cases=cases).splitlines()
    shown = {line.split()[0]: " ".join(line.split()[1:]) for line in lines}
    assert head.split()[-4:] == ["x", "plain", "x", "timm"]
    # 20 images/s of 1 G multiply-adds are 120 GFLOP/s.
    times = "6.00 1.00 100.0 [50.0..200.0] 20.0 12.0% 420 120 1.0"
    assert shown["eager"] == f"{times} 2.00 0.50"
    assert shown["other"].endswith("1.0")
    assert "1000000000000.0" in rate


def test_the_command_prints_a_table_and_keeps_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_steps, "_SIDES", {"cpu": (64,)})
    out, profile = tmp_path / "result.json", tmp_path / "profile.txt"
    model._main(
        "--model so_vit_7 --subjects ours timm --stages plain eager --rounds 1 "
        f"--batch-size 2 --img-size 32 --round-s 0 --num-threads 1 --json {out} "
        f"--profile {profile}".split()
    )
    assert profile.read_text().count("aten::") > 10
    printed = capsys.readouterr().out
    rates, *found = json.loads(out.read_text())["rounds"]
    assert rates["flops_per_s"] > 0
    assert [one["case"] for one in found] == [
        f"{name}, {stage}"
        for name in ("so_vit_7", "deit_tiny_patch16_224")
        for stage in ("plain", "eager")
    ]
    for one in found:
        assert one["case"] in printed
        assert one["peak_mb"] > one["at_rest_mb"] > 0


def test_what_fails_in_a_process_is_raised() -> None:
    wrong = changed(img_size=40)  # no multiple of 16
    with model_steps.open_process("cpu") as pool:
        with pytest.raises(ValueError, match="img_size: expected"):
            model_steps.time_case(pool, wrong, round_s=0)
        pool.submit(os._exit, 1)
        with pytest.raises(ValueError, match="lower --batch-size"):
            model_steps.time_case(pool, CASE, round_s=0)


def test_a_table_shows_what_is_there() -> None:
    cases = {"eager": CASE, "plain": changed(stage="plain")}
    shown = table(pd.DataFrame(rounds_of("eager", 100)), cases=cases)
    assert "nan%" in shown


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"model": "resnet50"}, r"expected model of .* got \['resnet50'\]"),
        ({"stages": ()}, r"expected stages of .* got \[\]; set --stages"),
        ({"batch_size": 3}, "an even batch size, got 3 and 3; set --rounds"),
        ({"rounds": 0}, "a round at least"),
    ],
)
def test_bad_options_say_what_was_wanted(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Options(**fields)


def test_a_device_without_bfloat16_has_no_such_stage(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(model, "has_bfloat16", lambda device: False)
    options = Options(device="cpu", stages=("eager", "bfloat16"), subjects=("ours",))
    assert [case.stage for case in cases_of(options).values()] == ["eager"]
    only = dataclasses.replace(options, stages=("bfloat16",))
    with pytest.raises(ValueError, match=r"a stage that cpu can do, got bfloat16"):
        cases_of(only)
