"""A dry run says what a run would do, and starts nothing."""

from __future__ import annotations

import dataclasses
import math
import re
import sys
from pathlib import Path

import pytest
import torch

import sovit
from pipelines import train
from pipelines.checkpoints.run_record import new_record
from pipelines.checkpoints.snapshot import Snapshot
from pipelines.checkpoints.store import CheckpointStore
from pipelines.config import Scale, Validation
from pipelines.config.overrides import change_fields
from pipelines.config.recipes import load_recipe
from pipelines.config.serialization import to_json
from pipelines.data.batch import Position
from pipelines.dry_run import explain
from pipelines.dry_run.report import as_text, hours_text, size_text
from pipelines.dry_run.timing import Timed
from pipelines.training.model import (
    count_parameters,
    shapes_of,
)
from tests.demo_runs import RECIPE
from tests.small_runs import SO_VIT, small_run, state_of
from tests.small_sets import write_set
from tuning.checks import check_sweep
from tuning.trials.options import Search


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("explain") / "shards"
    return write_set(folder, groups=[[10, 10], [9]])


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time nothing: another test does."""
    timed = Timed(
        device="cpu",
        num_threads=1,
        matrix_rate=4e9,
        batch_size=12,
        images_per_s=100.0,
    )
    monkeypatch.setattr(explain, "time_here", lambda *_, **__: timed)


@pytest.fixture
def recipe(address: str, tmp_path: Path) -> str:
    """Write a recipe of a small run into a folder of its own."""
    run = small_run(address, model=SO_VIT, ema_decay=0.9)
    run = dataclasses.replace(run, storage=str(tmp_path / "runs"))
    (tmp_path / "run.json").write_text(to_json(run))
    (tmp_path / "recipe.py").write_text(RECIPE)
    return f"{tmp_path / 'recipe.py'}:small"


@pytest.mark.usefixtures("quick")
def test_a_dry_run_prints_all_and_leaves_nothing(
    recipe: str, address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import ray

    before = sorted(tmp_path.rglob("*"))
    train._main([recipe, "--dry-run", "--name", "mine", "--scale.num-workers", "2"])
    said = capsys.readouterr().out
    model = shapes_of(SO_VIT, num_classes=3)
    assert f"{count_parameters(model).num:,} parameters, all trained" in said
    assert "patch_embed" in said
    assert f"29 images in 2 shards, {size_text(shard_bytes(address))}" in said
    assert "9 in 3 epochs of 3, of 12 images; an epoch's last of 5" in said
    assert "2 workers on CPUs, 1 micro-batch of 6 images" in said
    assert "activations" in said
    assert f"checkpoints  {tmp_path}/runs/mine" in said
    assert f"MLflow       sqlite:///{tmp_path}/runs/mlflow.db" in said
    assert "100.0 images/s here" in said
    assert sorted(tmp_path.rglob("*")) == before
    assert not ray.is_initialized()


@pytest.mark.usefixtures("quick")
def test_few_tokens_are_one_line(
    recipe: str, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    wide = ["--model.pooling.reduced-dim", "6", "7", "--name", "mine"]
    train._main([recipe, "--dry-run", *wide])
    said = capfd.readouterr()
    few = "so_vit_7: the covariance of 4 tokens is pooled, and its smaller dimension is"
    assert " ".join(said.out.split()).count(f"warnings {few} 6:") == 1
    assert said.out.count("of 4 tokens") == 1
    assert "tokens" not in said.err
    assert not [one for one in recwarn if one.category is sovit.FewTokensWarning]


def test_a_sweep_says_it_once_before_its_trials(
    recipe: str, caplog: pytest.LogCaptureFixture
) -> None:
    wide = {"pooling.reduced_dim": (6, 7)}
    check_sweep(change_fields(load_recipe(recipe), wide), search=Search())
    (said,) = (r.message for r in caplog.records if "of 4 tokens" in r.message)
    assert "\n" not in said


def shard_bytes(address: str) -> int:
    return sum(path.stat().st_size for path in Path(address).glob("*.parquet"))


@pytest.mark.usefixtures("quick")
def test_hours_are_operations_by_rate_and_workers(address: str, tmp_path: Path) -> None:
    run = small_run(address, model=SO_VIT)
    run = dataclasses.replace(
        run,
        storage=str(tmp_path),
        scale=Scale(num_workers=2),
        validation=Validation(also=(f"again={address}",)),
    )
    found = explain.explain_run(run, name="mine")
    assert "again: 29 images in 2 shards" in as_text(found)
    macs = found.training_macs * 3 * 29 + found.macs * 3 * 2 * 29
    assert found.flops_left == 2 * macs
    assert found.hours(1e6) == pytest.approx(2 * macs / 1e6 / 2 / 3600)
    assert found.places.mlflow == f"sqlite:///{tmp_path}/mlflow.db"
    assert found.places.goes_on_from is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what it does without one")
def test_without_the_gpu_it_tells_hours_for_a_rate(
    address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = small_run(address, model=SO_VIT)
    scale = Scale(num_workers=2, use_gpu=True, compile=True, grad_checkpointing=True)
    data = dataclasses.replace(run.data, decoder="auto")
    run = dataclasses.replace(run, storage=str(tmp_path), scale=scale, data=data)
    found = explain.explain_run(run, name="mine")
    text = as_text(found)
    assert found.timed is None
    assert found.is_bfloat16
    assert f"{hours_text(found.hours(100e12))} if each of 2 workers does 100" in text
    assert "no GPU here" in text
    assert "it wants GPUs, and here is none" in text
    assert "compiled, activations computed again" in text
    for name, note in (("context", "CUDA"), ("nccl", "GPUs"), ("dali", "nvJPEG")):
        assert re.search(rf"  {name} +\d+\.\d MB  .*{note}.*(assumed|estimate)", text)
    own = [line for line in text.splitlines() if str(tmp_path.parents[1]) not in line]
    assert max(map(len, own)) <= 92


@pytest.mark.usefixtures("quick")
def test_a_resumed_run_is_explained_from_its_last_checkpoint(
    recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = load_recipe(recipe)
    new_record(run, name="mine")
    train._main(["--resume", "mine", "--storage", run.storage, "--dry-run"])
    assert "goes on from the beginning: no checkpoint" in capsys.readouterr().out
    state = state_of(run)
    snapshot = Snapshot(
        run=run,
        position=Position(epoch=1, batch=1, step=4),
        classes=("c0", "c1", "c2"),
        metrics={},
        model=state.model.state_dict(),
        ema=None,
        optimizer=None,
    )
    place = explain.StoragePath(run.storage).within("mine")
    CheckpointStore(place, num_to_keep=2).write(snapshot, name="step_00000004")
    before = sorted(tmp_path.rglob("*"))
    train._main(["--resume", "mine", "--storage", run.storage, "--dry-run"])
    said = capsys.readouterr().out
    assert "4 are done, 5 are left" in said
    assert f"{2 * 29 - 12:,} images to train on" in said
    assert "goes on from step_00000004" in said
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.usefixtures("quick")
def test_what_can_not_start_ends_as_the_start_does(recipe: str, tmp_path: Path) -> None:
    new_record(load_recipe(recipe), name="taken")
    cases = {
        "already holds": ["--name", "taken"],
        "letters, digits": ["--name", "a/b"],
        "which is not there": ["--data.train", str(tmp_path / "none")],
        "timm knows": ["--model.name", "no_such_model"],
    }
    for words, arguments in cases.items():
        with pytest.raises(ValueError, match=words) as dry:
            train._main([recipe, "--dry-run", *arguments])
        with pytest.raises(ValueError, match=words) as real:
            train._main([recipe, *arguments])
        assert str(dry.value) == str(real.value)


@pytest.mark.usefixtures("quick")
def test_the_rate_is_drawn_where_that_is_asked_for(
    recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "rate.png"
    train._main([recipe, "--dry-run", "--plot", str(picture)])
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.endswith(f"picture     {picture}\n")
    with pytest.raises(ValueError, match="expected --dry-run with --plot"):
        train._main([recipe, "--plot", str(picture)])
    with pytest.raises(ValueError, match=r"plot: expected a file that ends in \.png"):
        train._main([recipe, "--dry-run", "--plot", "rate.txt"])
    with pytest.raises(ValueError, match="folder that is there"):
        train._main([recipe, "--dry-run", "--plot", str(tmp_path / "no" / "a.png")])


@pytest.mark.usefixtures("quick")
def test_a_terminal_without_blocks_gets_ascii(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "said.txt"
    with path.open("w", encoding="ascii") as out:
        monkeypatch.setattr(sys, "stdout", out)
        train._main([recipe, "--dry-run"])
    assert "####" in path.read_text()


def test_a_model_that_looks_at_values_leaves_its_memory_unknown(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("looks at a value")

    monkeypatch.setattr(explain, "measure_step", fail)
    run = small_run(address, model=SO_VIT)
    run = dataclasses.replace(
        run, storage=str(tmp_path), scale=Scale(use_gpu=True, amp="off")
    )
    found = explain.explain_run(run, name="mine")
    assert found.memory is None
    assert "RuntimeError: looks at a value" in as_text(found)
    assert not math.isnan(found.hours(1e12))
