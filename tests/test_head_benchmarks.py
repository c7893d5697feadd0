"""The heads' benchmark compares what is the same, and counts what is kept."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from benchmarks import heads
from benchmarks.head_cases import Case, cases, curves
from benchmarks.heads import kept


@pytest.mark.parametrize("case", cases(1), ids=lambda case: case.name)
def test_both_versions_have_the_same_values_and_gradients(case: Case) -> None:
    x = case.input("cpu").double().requires_grad_()
    got, wanted = case.ours(x), case.plain(x)
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
    short = ["--rounds=1", "--round-s=0", "--batch-size=1", "--num-threads=1"]
    heads._main([*short, "--json", str(out), "--plot", str(picture)])
    printed = capsys.readouterr().out
    content = json.loads(out.read_text())
    assert [found["case"] for found in content["rounds"]] == [c.name for c in cases(1)]
    for found in content["rounds"]:
        assert found["case"] in printed
        assert found["speedup"] == found["plain_ms"] / found["ours_ms"] > 0
        assert found["ours_kept"] > 0 < found["plain_kept"]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert len(curves()) == 8


def test_versions_that_do_not_agree_are_not_timed() -> None:
    (case, *_) = cases(1)
    wrong = dataclasses.replace(case, plain=lambda x: 2 * case.plain(x))
    with pytest.raises(AssertionError):
        heads.compare(wrong, compiled=False, round_s=0, device="cpu")
