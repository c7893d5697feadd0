"""Folders that were moved, and paths that hold anything a file system takes."""

from __future__ import annotations

import dataclasses
import functools
import os
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient
from PIL import Image

from pipelines import tracking, train
from pipelines.checkpoints.run_record import (
    Record,
    find_record,
    new_record,
    read_record,
)
from pipelines.config import Run
from pipelines.config.overrides import change_fields
from pipelines.config.serialization import to_json
from pipelines.driver.fit import fit
from pipelines.driver.preflight import (
    check_same,
    check_shards,
    check_start,
    run_and_storage,
)
from pipelines.errors import StoppedEarly
from pipelines.evaluate import _main as evaluate
from pipelines.export.command import _main as export
from pipelines.predict import _main as predict
from pipelines.results.compare import _main as compare
from pipelines.storage.filesystem import absolute, open_filesystem
from pipelines.storage.redaction import command_line
from pipelines.tracking.client import sqlite_path, sqlite_uri
from pipelines.tracking.query import RunStore
from pipelines.train import _main
from pipelines.training.model import build_model
from tests.demo_runs import RECIPE
from tests.fault_runs import At, brief_run
from tests.mlflow_stores import prepare_store

ODD = "a b&;%20%?~é#$'"


def _stop() -> None:
    raise StoppedEarly("as the test wants it")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return brief_run(tmp_path_factory.mktemp("moved"), num_epochs=1)


def test_a_run_whose_shards_and_folder_have_moved_goes_on_there(
    base: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To a place of odd letters, with other settings of reading."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    run = dataclasses.replace(base, storage=str(tmp_path / "old/runs"))
    prepare_store(run.storage)
    with pytest.raises(StoppedEarly):
        fit(run, name="mine", callbacks=[At({1: _stop})])
    new = tmp_path / ODD
    shutil.move(tmp_path / "old", new)
    shutil.copytree(Path(base.data.train), new / "train")
    shutil.copytree(Path(base.data.val), new / "val")
    monkeypatch.chdir(new)
    flags = "--data.train=train --data.val=val --data.num-readers=3"
    flags += " --data.num-decode-threads=2 --data.read-ahead-mb=32 --experiment=other"
    _main(["--resume", "runs/mine/", *flags.split(), "--data.eval-batch-size", "50"])
    assert not (tmp_path / "old").exists()
    assert (new / "runs/mine/epoch_0001/checkpoint.json").exists()
    uri = tracking.default_uri("runs")
    (found,) = RunStore(uri).find(["mine"])
    assert (found.status, found.tags["num_restarts"]) == ("FINISHED", "1")
    assert found.tags["data.train.source"] == str(new / "train")
    assert list((new / "runs/mlartifacts").rglob("MLmodel"))
    location = MlflowClient(uri).get_run(found.run_id).info.artifact_uri
    assert location is not None
    assert location.startswith((new / "runs/mlartifacts").as_uri())
    assert {path.name for path in tmp_path.iterdir()} == {ODD}


def test_a_resume_and_its_dry_run_know_the_shards_and_need_no_start(
    base: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The shards by what is in them; the weights are in the checkpoint."""
    start, moved = tmp_path / "start.pth", str(tmp_path / "moved")
    torch.save(build_model(base.model, num_classes=10).state_dict(), start)
    run = change_fields(
        base, {"model.init_from": str(start), "storage": str(tmp_path / "runs")}
    )
    prepare_store(run.storage)
    with pytest.raises(StoppedEarly):
        fit(run, name="mine", callbacks=[At({1: _stop})])
    start.unlink()
    shutil.copytree(Path(base.data.train), moved)
    resume = ["--resume", f"{run.storage}/mine", "--data.train"]
    with pytest.raises(ValueError, match=r"data\.train: expected the shards"):
        _main([*resume, base.data.val, "--dry-run"])
    _main([*resume, moved, "--dry-run"])
    assert "start.pth" not in capsys.readouterr().out
    monkeypatch.setattr(train, "fit", functools.partial(fit, keep_model=False))
    _main([*resume, moved])
    shutil.rmtree(Path(run.storage, "mine", "epoch_0001"))
    record = find_record(run.storage, name="mine")
    assert record is not None
    assert record.status == "finished"
    for checkpoint in Path(run.storage, "mine").glob("step_*"):
        shutil.rmtree(checkpoint)
    with pytest.raises(ValueError, match=r"model\.init_from: expected a checkpoint"):
        check_start(record.run, name="mine", record=record)


def test_what_a_run_prints_can_be_pasted(
    base: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / ODD
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    prepare_store("runs")
    run = dataclasses.replace(base, storage="runs")
    (folder / "run.json").write_text(to_json(run))
    (folder / "recipe.py").write_text(RECIPE)
    shutil.copytree(Path(base.data.val), folder / "val")
    _main(["recipe.py:small", "--name", "mine", "--data.val", str(folder / "val")])
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    said = {name: rest[0] for name, *rest in lines if rest}
    program, *arguments = shlex.split(said["evaluate"])
    assert program.endswith("sovit-eval")
    evaluate(arguments)
    assert "top-1" in capsys.readouterr().out
    *_, address = shlex.split(said["compare"])
    assert [run.name for run in RunStore(address).find(["mine"])] == ["mine"]
    assert sqlite_path(address) == folder / "runs/mlflow.db"
    checkpoint, photo = arguments[0], f"{ODD}.png"
    Image.new("L", (28, 28)).save(photo)
    predict([checkpoint, photo])
    assert capsys.readouterr().out.startswith(f"{photo}\n")
    export([checkpoint, f"out/{ODD}", "--formats", "timm", "--images", photo])
    assert (folder / f"out/{ODD}/model.safetensors").exists()
    compare(["mine", "--store", address, "--html", f"{ODD}.html"])
    assert "mine" in Path(f"{ODD}.html").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {ODD}


@pytest.mark.parametrize("odd", [ODD, "plain", "100%", "what?"])
def test_an_sqlite_file_is_found_whatever_its_path(tmp_path: Path, odd: str) -> None:
    path = tmp_path / odd / "mlflow.db"
    assert sqlite_path(sqlite_uri(path)) == path
    assert sqlite_path(tracking.default_uri(str(path.parent))) == path


def test_a_tilde_is_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    assert absolute("~/runs") == "/home/someone/runs"
    assert absolute("a~/runs") == os.path.abspath("a~/runs")
    assert absolute("s3://bucket/~/x") == "s3://bucket/~/x"
    assert open_filesystem("~/x")[1] == "/home/someone/x"
    assert tracking.default_uri("~/runs") == "sqlite:////home/someone/runs/mlflow.db"


def test_commands_are_quoted_and_have_no_secrets() -> None:
    line = command_line("ls", "a b", "x;y", "s3://key:word@bucket/x")
    assert shlex.split(line) == ["ls", "a b", "x;y", "s3://bucket/x"]
    assert "word" not in line


def test_shards_are_the_same_by_what_is_in_them(base: Run) -> None:
    digests = {"train": "1", "val": "2"}
    record = Record(name="a", run=base, digests=digests)
    elsewhere = dataclasses.replace(
        base, data=dataclasses.replace(base.data, train="/x", val="/y")
    )
    check_same(base, elsewhere)
    check_shards(record, now=elsewhere, digests=digests)
    with pytest.raises(
        ValueError, match=r"data\.val: expected the shards.*--data\.val"
    ):
        check_shards(record, now=base, digests={"train": "1", "val": "3"})
    before = dataclasses.replace(record, digests={})  # of an earlier version
    check_shards(before, now=base, digests=digests)
    with pytest.raises(ValueError, match=r"data\.train: expected the shards"):
        check_shards(before, now=elsewhere, digests=digests)


def _resume(run: Run, *arguments: str, folder: Path) -> None:
    (folder / "run.json").write_text(to_json(run))
    (folder / "recipe.py").write_text(RECIPE)
    _main([f"{folder}/recipe.py:small", *arguments])


def test_resume_with_another_recipe_or_name_is_refused(
    base: Run, tmp_path: Path
) -> None:
    run = dataclasses.replace(base, storage=str(tmp_path / "runs"))
    new_record(run, name="mine")
    folder = f"{tmp_path}/runs/mine"
    other: Any = dataclasses.replace(
        run, recipe="other", optim=dataclasses.replace(run.optim, lr=1.0)
    )
    with pytest.raises(ValueError, match=r"for optim\.lr, recipe; leave out .*recipe"):
        _resume(other, "--resume", folder, folder=tmp_path)
    with pytest.raises(ValueError, match=r"--name x and --resume mine; leave one out"):
        _resume(run, "--resume", folder, "--name", "x", folder=tmp_path)
    with pytest.raises(ValueError, match=r"--storage elsewhere, or its folder alone"):
        run_and_storage(folder, storage="elsewhere")
    with pytest.raises(
        ValueError, match=r"a checkpoint of 'mine'; give --resume .*mine"
    ):
        run_and_storage(f"{folder}/epoch_0001", storage="")
    assert run_and_storage("mine", storage="x") == ("mine", "x")
    assert run_and_storage("s3://b/runs/mine", storage="") == ("mine", "s3://b/runs")
    assert read_record(run.storage, name="mine").status == "running"
