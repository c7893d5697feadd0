"""The heads' benchmark compares what is the same, and counts what is kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

import sovit
from benchmarks import heads, step_share, token_gain, trainings
from benchmarks.family import HEADS, build, table
from benchmarks.head_cases import Case, cases, curves
from benchmarks.heads import kept
from benchmarks.trainings import Trained
from recipes.demo import demo
from sovit.tokens import TOKEN_STRIDES


@pytest.mark.parametrize("case", cases(1), ids=lambda case: case.name)
def test_both_versions_have_the_same_values_and_gradients(case: Case) -> None:
    x = case.input("cpu").double().requires_grad_()
    got, wanted = case.ours(x), case.straightforward(x)
    if case.exact is not None:
        exact = case.exact(x)
        assert 0 < torch.dist(got, exact) < torch.dist(wanted, exact)
        return
    # The straightforward eigenvalues are kept off zero.
    tolerance = 2e-2 if case.name.startswith("MPN-COV") else 1e-8
    torch.testing.assert_close(got, wanted, rtol=0, atol=tolerance)
    if not case.name.startswith("MPN-COV"):
        (got_grad,) = torch.autograd.grad(got.square().sum(), x)
        (wanted_grad,) = torch.autograd.grad(wanted.square().sum(), x)
        if case.of_matrix and case.num_rows is None:
            # Of a symmetric matrix the symmetric part counts.
            wanted_grad = (wanted_grad + wanted_grad.mT) / 2
        torch.testing.assert_close(got_grad, wanted_grad, rtol=1e-6, atol=1e-9)


def test_an_accelerator_times_the_exact_heads_with_each_placement() -> None:
    names = [case.name for case in cases(1, device="cuda")]
    for tokens in ("MPN-COV, 196 tokens of 256", "MPN-COV, 49 tokens of 256"):
        assert [name for name in names if name.startswith(tokens)] == [
            tokens,
            f"{tokens}, on the device",
            f"{tokens}, on the host",
        ]


def test_kept_counts_what_autograd_keeps() -> None:
    x = torch.ones(3, 4)
    assert kept(lambda x: x.exp(), x) == 1.0
    assert kept(lambda x: x.exp().exp(), x) == 2.0
    assert kept(lambda x: x + 1, x) == 0.0


def test_the_command_prints_a_table_and_keeps_figures_and_a_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heads, "_CURVE_DIMS", (8, 16))
    out, picture = tmp_path / "result.json", tmp_path / "costs.png"
    short = ["--rounds", "1", "--round-s", "0", "--batch-size", "1", "--steps"]
    heads._main([*short, "--json", str(out), "--plot", str(picture)])
    printed = capsys.readouterr().out
    content = json.loads(out.read_text())
    assert [found["name"] for found in content["heads"]] == [c.name for c in cases(1)]
    assert all(found["name"] in printed for found in content["heads"])
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert len(curves()) == 8


def test_what_was_measured_is_there_when_a_case_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    names, real = [case.name for case in cases(1)], heads.compare

    def compare(case: Case, **settings: Any) -> heads.Result:
        if case.name == names[2]:
            raise ValueError("stopped here")
        return real(case, **settings)

    monkeypatch.setattr(heads, "compare", compare)
    out = tmp_path / "result.json"
    short = "--rounds 1 --round-s 0 --batch-size 1 --steps so_vit_7 --json"
    with pytest.raises(ValueError, match="stopped here"):
        heads._main([*short.split(), str(out)])
    content = json.loads(out.read_text())
    assert [found["name"] for found in content["heads"]] == names[:2]
    assert content["missing"] == [*names[2:], "so_vit_7"]
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]
    said = capsys.readouterr()
    assert names[1] in said.out
    assert f"not measured: {names[2]}" in said.err


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_share_is_of_the_step_that_a_run_makes(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_half = dtype == torch.bfloat16
    monkeypatch.setattr(step_share, "has_bfloat16", lambda device: in_half)
    monkeypatch.setattr(step_share, "_NUM_ROUNDS", 1)
    products: set[torch.dtype] = set()
    layouts: set[bool] = set()

    def note(module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
        if isinstance(module, nn.Linear | nn.Conv2d):
            products.add(output.dtype)
        if isinstance(module, nn.Conv2d):
            formats = {"memory_format": torch.channels_last}
            layouts.add(given[0].is_contiguous(**formats))
            layouts.add(module.weight.is_contiguous(**formats))

    hook = register_module_forward_hook(note)
    try:
        share = step_share.measure_share(
            "so_vit_7",
            batch_size=2,
            device="cpu",
            img_size=32,
            settings={"img_size": 32},
        )
    finally:
        hook.remove()
    assert products == {dtype}
    assert layouts == {True}
    assert share.dtype == str(dtype).removeprefix("torch.")
    assert share.step_ms > share.head_ms > 0


@pytest.mark.parametrize("head", HEADS)
def test_the_small_backbone_takes_every_head(head: str) -> None:
    model = build(head, 10)
    assert isinstance(model, sovit.SecondOrderNet)
    tokens = model.to_tokens(model.forward_features(torch.zeros(1, 3, 32, 32)))
    assert tokens.shape[1] >= 49
    model(torch.randn(2, 3, 32, 32)).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert model.get_submodule("backbone.layer4")(torch.randn(1, 64, 8, 8)).shape == (
        1,
        128,
        8,
        8,
    )


@pytest.mark.parametrize("stride", TOKEN_STRIDES)
def test_few_and_many_tokens_are_trained_with_both_heads(stride: int) -> None:
    count = token_gain.num_tokens(stride)
    both, alone = (
        token_gain.build(demo().model, stride, fusion, 10)
        for fusion in ("sum", "class")
    )
    assert isinstance(both, sovit.SoViT)
    assert both.forward_features(torch.zeros(1, 3, 32, 32)).shape[1] == 1 + count
    assert set(both.state_dict()) > set(alone.state_dict())


def test_trainings_take_turns_and_are_kept_when_one_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []

    def train(build: Any, *, seed: int, num_epochs: int) -> Trained:
        made.append(seed)
        if len(made) == 4:
            raise ValueError("stopped here")
        return Trained(top1=70 + seed, ema_top1=0.0, num_params=1, seconds=1.0)

    monkeypatch.setattr(trainings, "train_once", train)
    out = tmp_path / "result.json"
    with pytest.raises(ValueError, match="stopped here"):
        token_gain._main(["--strides", "4", "--num-seeds", "2", "--json", str(out)])
    assert made == [0, 0, 1, 1]
    content = json.loads(out.read_text())
    found = {name: len(of) for name, of in content["trainings"].items()}
    assert found == {"stride 4, class": 2, "stride 4, sum": 1}
    assert content["missing"] == ["stride 4, sum, seed 1"]


def test_a_gain_is_of_the_same_seed(tmp_path: Path) -> None:
    def reached(*top1s: float) -> list[Trained]:
        return [
            Trained(top1=top1, ema_top1=0.0, num_params=1, seconds=1.0)
            for top1 in top1s
        ]

    results = {
        "stride 4, class": reached(80, 90),
        "stride 4, sum": reached(83, 95),
        "stride 16, class": reached(60, 70),
        "stride 16, sum": reached(59),  # stopped before its end
    }
    assert token_gain.gains(results, strides=(4, 16)) == {4: [3, 5], 16: [-1]}
    many, few = token_gain.table(results, strides=(4, 16)).splitlines()[-2:]
    wanted = "64 85.00 +- 7.07 89.00 +- 8.49 4.00 +- 1.41"
    assert " ".join(many.split()) == wanted
    assert few.split()[0] == "4"
    token_gain.plot(tmp_path / "gain.png", results=results, strides=(4, 16))
    assert (tmp_path / "gain.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="strides of"):
        token_gain.Options(strides=(5,))


def test_the_comparison_gives_mean_and_sample_deviation() -> None:
    found = [
        Trained(top1=top1, ema_top1=80.0, num_params=1234, seconds=2.0)
        for top1 in (70.0, 72.0, 74.0)
    ]
    assert "72.00 +- 2.00" in table({"svPN": found})
    assert "80.00 +- 0.00" in table({"svPN": found[:1]})
