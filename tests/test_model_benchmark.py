"""`python -m benchmarks.model`: equal work, each stage as it says, figures that fit."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.utils.model_ema import ModelEmaV3

from benchmarks import model, model_rounds
from benchmarks.model import Measured, Options, as_json, cases_of, mfu, table
from benchmarks.model_cases import (
    RIVALS,
    STAGES,
    Case,
    Size,
    build_steps,
    make_contiguous,
    run_of,
    size_of,
)
from benchmarks.model_rounds import (
    Begun,
    Rounds,
    StepRound,
    begin,
    matrix_rates,
    time_steps,
)
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
    assert 0.8 < other.num_params / ours.num_params < 1.2
    assert class_token.num_params < ours.num_params
    # The head costs parameters, and next to no products.
    assert 0.97 < class_token.macs / ours.macs < 1


def test_each_stage_is_what_it_says() -> None:
    for name, stage in STAGES.items():
        scale = run_of(changed(stage=name)).scale
        assert scale.compile == stage.compile == (name == "compile")
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

    at_rest_mb, peak_mb = model_rounds._memory_mb(steps, device=torch.device("cpu"))
    assert 60 < peak_mb - at_rest_mb < 80
    assert at_rest_mb > 100  # Python with torch


def test_a_case_begins_and_then_takes_rounds() -> None:
    begun = begin(CASE)
    assert begun.first_step_s > 0 < begun.warm_step_ms
    assert begun.peak_mb >= begun.at_rest_mb > 0
    assert time_steps(CASE, num_steps=1) > 0


def test_mfu_counts_three_forward_passes_against_the_measured_rate() -> None:
    # 10 images/s of 5 G multiply-adds are 300 GFLOP/s.
    assert mfu(10, macs=5 * 10**9, rate=1e12) == pytest.approx(0.3)


def test_matrix_rates_are_by_type_and_side(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_rounds, "_SIDES", {"cpu": (16, 32)})
    monkeypatch.setattr(model_rounds, "_MATRIX_S", 0.0)
    rates = matrix_rates([torch.float32, torch.bfloat16], device="cpu")
    assert {dtype: set(of) for dtype, of in rates.items()} == {
        torch.float32: {16, 32},
        torch.bfloat16: {16, 32},
    }
    assert all(rate > 0 for of in rates.values() for rate in of.values())


def rounds_of(*times_ms: float) -> Rounds:
    return Rounds(
        begun=Begun(
            first_step_s=1.0, warm_step_ms=1.0, at_rest_mb=300.0, peak_mb=420.0
        ),
        rounds=tuple(
            StepRound(step_ms=time_ms, num_steps=1, other_cores=0.0)
            for time_ms in times_ms
        ),
    )


def test_cases_are_compared_round_by_round() -> None:
    plain, other = changed(stage="plain"), changed(subject="timm")
    measured = Measured(
        found={
            plain: rounds_of(100, 300, 200),
            CASE: rounds_of(50, 100, 200),
            other: rounds_of(25, 50, 400),
        },
        sizes={
            ("so_vit_7", "ours"): Size(num_params=5 * 10**6, macs=10**9),
            ("so_vit_7", "timm"): Size(num_params=6 * 10**6, macs=10**9),
        },
        rates={torch.float32: {512: 0.5e12, 1024: 1e12}},
    )
    models = json.loads(json.dumps(as_json(measured)))["models"]["so_vit_7"]
    ours = models["ours"]["stages"]["eager"]
    assert ours["to"]["plain"] == {"median": 2, "low": 1, "high": 3}
    assert ours["to"]["timm"]["median"] == 0.5
    assert set(ours["to"]) == {"plain", "timm"}
    assert models["timm"]["stages"]["eager"]["to"] == {}
    assert ours["images_per_s"]["median"] == 20
    assert ours["mfu"] == pytest.approx(6 * 20 * 1e9 / 1e12)
    assert (ours["peak_mb"], ours["step_mb"]) == (420, 120)
    assert [one["step_ms"] for one in ours["rounds"]] == [50, 100, 200]
    shown = table(measured)
    assert "deit_tiny_patch16_224: 6.00 M parameters, 1.00 G multiply-adds" in shown
    assert "100.0 [50.0..200.0]" in shown


def test_the_command_prints_a_table_and_keeps_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_rounds, "_SIDES", {"cpu": (64,)})
    out = tmp_path / "result.json"
    model._main(
        "--models so_vit_7 --subjects ours timm --stages plain eager --rounds 1 "
        f"--batch-size 2 --img-size 32 --round-s 0 --num-threads 1 --json {out}".split()
    )
    printed = capsys.readouterr().out
    content = json.loads(out.read_text())
    found = content["models"]["so_vit_7"]
    assert list(found) == ["ours", "timm"]
    for network in found.values():
        assert network["name"] in printed
        assert list(network["stages"]) == ["plain", "eager"]
        for stage in network["stages"].values():
            assert stage["dtype"] == "float32"
            assert stage["peak_mb"] > stage["begun"]["at_rest_mb"] > 0
    assert found["ours"]["stages"]["eager"]["to"].keys() == {"plain", "timm"}


def test_what_was_measured_is_there_when_a_case_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_rounds, "_SIDES", {"cpu": (64,)})
    real, num_rounds = model_rounds._round, 0

    def round_of(*args: Any, **settings: Any) -> StepRound:
        nonlocal num_rounds
        num_rounds += 1
        if num_rounds == 2:
            raise ValueError("stopped here")
        return real(*args, **settings)

    monkeypatch.setattr(model_rounds, "_round", round_of)
    out = tmp_path / "result.json"
    with pytest.raises(ValueError, match="stopped here"):
        model._main(
            "--models so_vit_7 --subjects ours --stages plain eager --rounds 2 "
            "--batch-size 2 --img-size 32 --round-s 0 --num-threads 1 "
            f"--json {out}".split()
        )
    content = json.loads(out.read_text())
    stages = content["models"]["so_vit_7"]["ours"]["stages"]
    assert list(stages) == ["plain"]
    assert len(stages["plain"]["rounds"]) == 1
    assert content["missing"] == ["so_vit_7, eager"]
    said = capsys.readouterr()
    assert "so_vit_7: " in said.out
    assert "not measured: so_vit_7, eager" in said.err


def test_a_process_that_fails_is_named() -> None:
    wrong = changed(img_size=40)  # no multiple of 16
    with pytest.raises(ValueError, match=r"so_vit_7, eager: img_size: expected"):
        model_rounds.time_cases(
            [wrong],
            num_rounds=1,
            round_s=0,
            between=lambda: None,
            on_round=lambda rounds: None,
        )


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"models": ("resnet50",)}, r"expected models of .* got \['resnet50'\]"),
        ({"stages": ()}, r"expected stages of .* got \[\]; set --stages"),
        ({"batch_size": 3}, "an even batch size, got 3 and 3; set --rounds"),
        ({"device": "tpu"}, r"expected device of .*'cpu'.*, got \['tpu'\]"),
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
    assert [case.stage for case in cases_of("so_vit_7", options=options)] == ["eager"]
    only = dataclasses.replace(options, stages=("bfloat16",))
    with pytest.raises(ValueError, match=r"a stage that cpu can do, got bfloat16"):
        cases_of("so_vit_7", options=only)
