"""Plans are trained, go on where they stopped, and become a page with intervals."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import sovit
from benchmarks.evidence import __main__ as command
from benchmarks.evidence import train
from benchmarks.evidence.__main__ import Options, measure
from benchmarks.evidence.intervals import (
    NO_DIFFERENCE,
    ONE_SEED,
    of_differences,
    paired,
    rank_text,
)
from benchmarks.evidence.page import write_page
from benchmarks.evidence.plan import Arm, Cell, Images, Plan
from benchmarks.evidence.plans import PLANS
from benchmarks.evidence.results import (
    Entry,
    next_cells,
    read_entries,
    write_entries,
)
from benchmarks.evidence.rows import rows_of
from pipelines.training.model import build_model

TINY = Plan(
    name="tiny",
    title="A tiny question",
    about="Two heads.",
    images=Images(name="squares", num_train=24, num_val=8),
    changes={
        "model.kwargs.embed_dim": 32,
        "model.kwargs.depth": 1,
        "model.kwargs.token_stride": 16,
        "data.batch_size": 12,
        "data.eval_batch_size": 8,
        "data.decoder": "torch",
        "optim.num_epochs": 1,
        "optim.warmup_epochs": 0,
    },
    rates=(1e-3, 2e-3),
    arms={
        "class token": Arm(changes={"model.kwargs.fusion": "class"}, num_seeds=2),
        "sum": Arm(changes={}, against="class token", num_seeds=2),
        "no number": Arm(
            changes={"optim.clip_grad_norm": 1e-3, "optim.weight_decay": 1e38},
            against="class token",
            num_seeds=1,
        ),
    },
    curves=("val/top1",),
)


def squares(folder: Path, *, num: int, split: str) -> None:
    random = np.random.default_rng(num)
    rows = []
    for number in range(num):
        pixels = random.integers(0, 80, (32, 32, 3)) + 90 * (number % 2)
        blob = io.BytesIO()
        Image.fromarray(pixels.astype(np.uint8)).save(blob, "PNG")
        rows.append({"bytes": blob.getvalue(), "path": f"{number}.png"})
    names = {"info": {"features": {"label": {"names": ["dark", "light"]}}}}
    table = pa.table({"image": rows, "label": [number % 2 for number in range(num)]})
    table = table.replace_schema_metadata({"huggingface": json.dumps(names)})
    folder.mkdir(exist_ok=True)
    pq.write_table(table, folder / f"{split}-00000-of-00001.parquet")


@pytest.fixture
def options(tmp_path: Path) -> Options:
    squares(tmp_path / "squares", num=30, split="train")
    squares(tmp_path / "squares", num=10, split="test")
    return Options(
        plans=("so_vit",),  # any: the tests name theirs
        data=tmp_path,
        work=tmp_path / "work",
        results=tmp_path / "evidence.json",
    )


def top1s(*values: float) -> dict[int, float]:
    return dict(enumerate(values, start=1))


def test_a_plan_that_was_stopped_goes_on_and_becomes_a_page(
    options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[str] = []
    train_cell = command.train_cell

    def stopping(cell: Cell, **settings: Any) -> Entry:
        if len(trained) == 3:
            raise KeyboardInterrupt
        trained.append(cell.key)
        return train_cell(cell, **settings)

    monkeypatch.setattr(command, "train_cell", stopping)
    with pytest.raises(KeyboardInterrupt):
        measure(TINY, options=options)
    before = read_entries(options.results)
    assert list(before) == sorted(trained)
    assert len(trained) == 3

    monkeypatch.setattr(command, "train_cell", train_cell)
    measure(TINY, options=options)
    entries = read_entries(options.results)
    assert {key: entries[key] for key in before} == before
    assert next_cells(TINY, entries) == []
    # A line for each cell: two rates of three arms, two seeds of two.
    assert options.results.read_text().count("\n") == 2 + 6 + 4
    first, second, bad = rows_of(TINY, entries)
    assert first.seeds_text == second.seeds_text == "2 of 2"
    assert first.entries[1]["curves"]["val/top1"][0][0] == 2
    assert (bad.rate, list(bad.tried)) == (None, [1e-3, 2e-3])

    write_page([TINY], entries, docs=tmp_path)
    page = (tmp_path / "evidence.md").read_text()
    (line,) = (line for line in page.splitlines() if line.startswith("| no number"))
    assert "- (0.001: diverged, 0.002: diverged)" in line
    pictures = {path.name: path.read_bytes() for path in tmp_path.glob("*.png")}
    assert set(pictures) == {
        "evidence.png",
        "evidence_tiny.png",
        "evidence_tiny_curves.png",
    }
    # From the file alone: neither runs nor photographs are there.
    docs = tmp_path / "docs"
    docs.mkdir()
    write_page([TINY], read_entries(options.results), docs=docs)
    assert (docs / "evidence.md").read_text() == page
    assert {path.name: path.read_bytes() for path in docs.glob("*.png")} == pictures


@pytest.mark.slow
def test_cells_train_at_once_each_in_a_process(options: Options) -> None:
    plan = dataclasses.replace(
        TINY, rates=(1e-3,), arms={"sum": Arm(changes={}, num_seeds=2)}
    )
    measure(plan, options=dataclasses.replace(options, num_concurrent=2))
    (row,) = rows_of(plan, read_entries(options.results))
    assert row.seeds_text == "2 of 2"
    assert row.rate == 1e-3


def finished(plan: Plan, **found: list[float | None]) -> dict[str, Any]:
    """Make entries: the first candidate reaches more, then a value a seed."""
    entries: dict[str, Any] = {}
    for arm, values in found.items():
        name = arm.replace("_", " ")
        tried = plan.cells(name, seed=0, rates=plan.rates)
        seeds = [
            plan.cells(name, seed=seed, rates=plan.rates[:1])[0]
            for seed in range(1, 1 + len(values))
        ]
        reached = [50.0 - number for number in range(len(tried))]
        for cell, top1 in zip([*tried, *seeds], [*reached, *values], strict=True):
            shared = {
                "settings": cell.settings(),
                "cpu_seconds": 1.0,
                "date": "2026-01-01",
                "cpu": "any",
            }
            if top1 is None:
                entries[cell.key] = {**shared, "status": "diverged", "reason": "NaN"}
                continue
            ended = {"status": "finished", "top1": top1, "num_params": 7}
            entries[cell.key] = {**shared, **ended}
    return entries


def test_a_diverged_seed_is_in_the_table_and_in_no_pair(tmp_path: Path) -> None:
    entries = finished(TINY, class_token=[60.0, 61.0], sum=[None, 63.5])
    write_page([TINY], entries, docs=tmp_path)
    page = (tmp_path / "evidence.md").read_text()
    (line,) = (line for line in page.splitlines() if line.startswith("| sum"))
    assert "2 of 2, 1 diverged" in line
    assert f"| 63.50 | class token | +2.50 | - | {ONE_SEED} |" in line


def test_the_rate_is_the_best_candidates_on_the_seed_that_is_not_counted() -> None:
    entries = finished(TINY, class_token=[60.0, 61.0])
    (row, *_) = rows_of(TINY, entries)
    assert (row.rate, row.top1s) == (1e-3, [60.0, 61.0])
    for cell in TINY.cells("class token", seed=0, rates=[2e-3]):
        entries[cell.key]["top1"] = 99.0
    (row, *_) = rows_of(TINY, entries)
    assert (row.rate, row.top1s) == (2e-3, [])


def test_entries_of_other_settings_are_trained_again(tmp_path: Path) -> None:
    entries = finished(TINY, class_token=[60.0, 61.0])
    changed = dataclasses.replace(TINY, changes={**TINY.changes, "seed": 3})
    assert not rows_of(changed, entries)[0].entries
    assert [cell.seed for cell in next_cells(changed, entries)] == [0] * 4
    failed = finished(TINY, class_token=[60.0, 61.0], sum=[1.0, 2.0], no_number=[1.0])
    assert next_cells(TINY, failed) == []
    key = next(key for key in failed if "sum" in key and "seed 2" in key)
    failed[key]["status"] = "failed"
    assert [cell.key for cell in next_cells(TINY, failed)] == [key]
    write_entries(tmp_path / "e.json", failed)
    assert read_entries(tmp_path / "e.json") == failed


def test_intervals_are_students_of_pairs() -> None:
    # Differences 1, 2, 3: deviation 1, and t of two degrees is 4.303 in any table.
    found = paired(top1s(11, 22, 33), top1s(10, 20, 30))
    assert found is not None
    assert found.mean == 2
    assert found.half_width == pytest.approx(4.3027 / 3**0.5, abs=1e-4)
    assert found.verdict == NO_DIFFERENCE
    # Of four degrees 2.776; the deviation of these is 0.5 ** 0.5.
    five = of_differences([1.0, 2.0, 2.0, 2.0, 3.0])
    assert five is not None
    assert five.half_width == pytest.approx(2.7764 * 0.5**0.5 / 5**0.5, abs=1e-4)
    assert (five.verdict, five.interval) == ("higher", "+1.12 to +2.88")
    fewer = of_differences([-1.0, -2.0, -2.0, -2.0, -3.0])
    assert fewer is not None
    assert fewer.verdict == "lower"


def test_seeds_without_a_partner_do_not_count() -> None:
    found = paired({1: 5.0, 2: 9.0}, {2: 8.0, 3: 1.0})
    assert found is not None
    assert (found.num_pairs, found.mean, found.verdict) == (1, 1.0, ONE_SEED)
    assert paired({1: 5.0}, {2: 5.0}) is None


def test_corruption_errors_are_in_percent_of_the_baselines_seed() -> None:
    entries = finished(TINY, class_token=[60.0, 60.0], sum=[60.0, 60.0])
    errors = {"class token": (40.0, 80.0), "sum": (44.0, 72.0)}
    for arm, (fog, snow) in errors.items():
        for seed in (1, 2):
            (cell,) = TINY.cells(arm, seed=seed, rates=[1e-3])
            entries[cell.key]["errors"] = {"fog": fog, "snow": snow}
    mce = rows_of(TINY, entries)[1].mce
    assert mce is not None
    assert mce.mean == pytest.approx((110 + 90) / 2 - 100)


def test_heads_are_ranked_against_full_training(tmp_path: Path) -> None:
    plan = dataclasses.replace(TINY, tokens_of=("so_vit", "sum"))
    entries = finished(plan, class_token=[60.0, 62.0], sum=[61.0, 63.0])
    for arm, heads in {"class token": (50.0, 58.0), "sum": (56.0, 54.0)}.items():
        for seed, head in enumerate(heads, start=1):
            (cell,) = plan.cells(arm, seed=seed, rates=[1e-3])
            entries[cell.key]["head_top1"] = head
    write_page([plan], entries, docs=tmp_path)
    page = (tmp_path / "evidence.md").read_text()
    # Ranks 1 4 3 2 against 1 3 2 4: 1 - 6 * (0 + 1 + 1 + 4) / (4 * 15).
    assert "of 4 settings: Spearman 0.40, Kendall 0.33" in page
    assert "heads alone 50.00 to 58.00 %, in full 60.00 to 63.00 %" in page
    assert (
        rank_text([1.0, 2.0], [1.0, 2.0])
        == "2 settings: too few, or too alike, to rank."
    )


def test_a_part_has_as_many_photographs_of_each_class() -> None:
    labels = pa.array([0] * 10 + [1] * 30)
    table = pa.table({"image": pa.array(range(40)), "label": labels})
    few = train.cut(table, num=8)
    assert few["label"].to_pylist() == [0] * 4 + [1] * 4
    assert few == train.cut(table, num=8)


def params_of(plan: Plan, arm: str) -> int:
    settings = plan.run(arm).model
    model = build_model(settings, num_classes=10)
    if isinstance(model, sovit.SecondOrderNet):
        images = torch.zeros(2, 3, settings.img_size, settings.img_size)
        tokens = model.to_tokens(model.forward_features(images))
        assert tokens.shape[1] == (settings.img_size // 8) ** 2
    return sum(one.numel() for one in model.parameters())


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_every_arm_of_a_plan_is_a_network_and_has_its_baseline(plan: Plan) -> None:
    for name, arm in plan.arms.items():
        assert arm.against in ("", *plan.arms)
        assert arm.rate_as in ("", *plan.arms)
        if not arm.init_from:
            assert params_of(plan, name) > 0
        if plan.images.name == "cifar10" and plan.name != "tokens":
            assert plan.run(name).model.kwargs.get("token_stride", 4) == 4


@pytest.mark.parametrize(
    ("plan", "baseline", "head"),
    [
        ("so_vit", "class token, wider", "sum"),
        ("so_vit_deep", "class token, wider", "sum"),
        ("pooling", "average, wider", "iSQRT-COV"),
    ],
)
def test_the_wider_baseline_has_as_many_parameters(
    plan: str, baseline: str, head: str
) -> None:
    wider, wanted = (params_of(PLANS[plan], arm) for arm in (baseline, head))
    assert wanted <= wider <= 1.01 * wanted


def test_wrong_options_are_said() -> None:
    with pytest.raises(ValueError, match="expected plans of"):
        Options(plans=("nothing",), data=Path())
    with pytest.raises(ValueError, match="--data DIR together"):
        Options(plans=("so_vit",))
    with pytest.raises(ValueError, match="or --report"):
        Options()
    with pytest.raises(ValueError, match="--num-concurrent"):
        Options(report=True, num_concurrent=0)


def test_missing_photographs_are_said(options: Options) -> None:
    missing = dataclasses.replace(TINY, images=Images(name="none"))
    with pytest.raises(ValueError, match="set --data"):
        measure(missing, options=options)
