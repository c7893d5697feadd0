"""From a folder of images to a trained model, in one command and without Ray."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch

from pipelines import predict, preview
from pipelines.checkpoints.run_record import find_record, write_record
from pipelines.config import Data, Facts, Run
from pipelines.config.recipes import load_recipe
from pipelines.driver.image_folders import shards_of_folders
from pipelines.train import _main
from pipelines.training.model import build_model
from recipes.finetune import folder
from tests.mlflow_stores import prepare_store
from tests.small_sets import jpeg
from tuning import search

SMALL = ["--scale.num-workers", "0", "--data.decoder", "torch", "--scale.amp", "off"]
QUICK = [*SMALL, "--optim.num-epochs", "1", "--data.num-prefetch-batches", "1"]


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write a folder of two classes, and work beside it."""
    monkeypatch.chdir(tmp_path)
    prepare_store(str(tmp_path / "runs"))
    root = tmp_path / "my photos"
    for at, name in enumerate(("cat", "dog")):
        (root / name).mkdir(parents=True)
        for number in range(20):
            content = jpeg(100 * at + number, size=(40, 34))
            (root / name / f"{number:02d}.jpg").write_bytes(content)
    return root


def test_a_folder_is_previewed_and_searched_on_too(
    source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["--data.train", str(source), "--model.img-size", "32", *SMALL]
    preview._main(["finetune.folder", *small, "--num-images", "2"])
    assert "picked    32 pixels, batches of 4" in capsys.readouterr().out
    chosen, rest = search._split(["finetune.folder", "optim", *small])
    sweep, _ = search._begun(chosen, rest)
    assert "picked    32 pixels, batches of 4" in capsys.readouterr().out
    data = sweep.run.data
    assert data.batch_size == 4
    assert {str(Path(place).parent.parent) for place in (data.train, data.val)} == {
        str(Path.cwd() / "runs" / "shards")
    }
    assert sweep.run.num_checkpoints_to_keep == 1


def facts(**changes: object) -> Facts:
    known = Facts(
        num_images=2640,
        num_classes=5,
        short_side=240,
        num_gpus=0,
        num_cpus=2,
        model="so_vit_7",
        init_from="",
    )
    return dataclasses.replace(known, **changes)  # type: ignore[arg-type]


def test_a_folder_is_trained_on_resumed_without_and_predicted(
    source: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", "pipelines")
    command = ["finetune.folder", "--data.train", "my photos", *QUICK]
    _main([*command, "--name", "mine", "--data.val-share", "0.2"])
    said = capsys.readouterr().out
    assert re.search(r"32 pixels, batches of 4 \(8 steps an epoch\), 1 epochs", said)
    assert "start     random weights: --model.init-from FILE" in said
    assert "held-out top-1 " in said
    assert " of 8 images" in said
    for what, name in (("confusions", "confusion.png"), ("worst", "worst.png")):
        (path,) = re.findall(rf"^{what} +(.*)$", said, flags=re.MULTILINE)
        assert Path(path).name == name
        assert Path(path).is_file()
    record = find_record("runs", name="mine")
    assert record is not None
    shards = Path(record.run.data.train)
    assert shards.parent.parent == source.parent / "runs" / "shards"
    assert record.run.data.val == str(shards.parent / "val")
    assert record.run.data.val_share is None

    # What is printed to predict with is what a shell takes.
    shutil.move(source, source.parent / "gone")
    (line,) = re.findall(r"^predict +(.*)$", said, flags=re.MULTILINE)
    predict._main(shlex.split(line)[1:])
    assert len(re.findall(r"^\S+/\d\d\.jpg$", capsys.readouterr().out, re.M)) == 8

    # Stopped before its end, it goes on with the shards alone.
    write_record(dataclasses.replace(record, status="running"))
    newest = sorted(Path("runs", "mine").glob("epoch_*"))[-1]
    shutil.rmtree(newest)
    _main([*command, "--resume", "mine", "--data.val-share", "0.2"])
    assert "resuming with the shards that this run began with" in caplog.text
    assert newest.is_dir()


def test_other_recipes_take_a_folder_and_drop_their_own_held_out_set(
    source: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "pipelines")
    command = ["demo", "--data.train", str(source), "--data.batch-size", "12", *QUICK]
    _main([*command, "--name", "clothes"])
    record = find_record("runs", name="clothes")
    assert record is not None
    assert Path(record.run.data.val).parent == Path(record.run.data.train).parent
    assert "is not of these images: left out" in caplog.text
    assert "picked" not in capsys.readouterr().out


def test_a_dry_run_makes_nothing(
    source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["finetune.folder", "--data.train", str(source), *QUICK]
    before = sorted(Path("runs").rglob("*"))
    _main([*command, "--dry-run"])
    said = capsys.readouterr().out
    assert f"would make {source.parent}/runs/shards/my-photos-" in said
    assert "held out: 4 images, 10% of each class" in said
    assert "picked    32 pixels" in said
    assert sorted(Path("runs").rglob("*")) == before
    run = load_recipe("finetune.folder")
    data = dataclasses.replace(run.data, train=str(source))
    shards_of_folders(dataclasses.replace(run, data=data))
    before = sorted(Path("runs").rglob("*"))
    _main([*command, "--dry-run"])
    said = capsys.readouterr().out
    assert "would make" not in said
    assert re.search(r"36 images", said)
    assert sorted(Path("runs").rglob("*")) == before


def run_on(train: str, **changes: object) -> Run:
    run = load_recipe("demo")
    data = dataclasses.replace(run.data, train=train, **changes)  # type: ignore[arg-type]
    return dataclasses.replace(run, data=data)


def test_a_share_is_refused_where_it_means_nothing(source: Path) -> None:
    demo = load_recipe("demo").data
    with pytest.raises(ValueError, match=r"none beside --data\.val, got 0\.2"):
        shards_of_folders(run_on(str(source), val_share=0.2))
    with pytest.raises(ValueError, match=r"a folder of images in --data\.train"):
        shards_of_folders(run_on(demo.train, val="", val_share=0.2))
    with pytest.raises(ValueError, match=r"data\.val_share: .* 0 < share < 1"):
        Data(train="x", batch_size=4, val_share=1.0)
    assert shards_of_folders(run_on(demo.train)) is None


def test_a_folder_beside_shards_takes_their_classes(source: Path) -> None:
    found = shards_of_folders(run_on(str(source), val=""))
    assert found is not None
    few = source.parent / "few"
    shutil.copytree(source / "dog", few / "dog")
    both = shards_of_folders(run_on(found.sets.train, val=str(few)))
    assert both is not None
    run = both.put_in(run_on(found.sets.train, val=str(few)))
    assert run.data.train == found.sets.train
    classes = json.loads((Path(run.data.val) / "classes.json").read_text())
    assert classes == ["cat", "dog"]
    strange = source.parent / "strange"
    shutil.copytree(source / "dog", strange / "wolf")
    with pytest.raises(ValueError, match="wolf"):
        shards_of_folders(run_on(found.sets.train, val=str(strange)))


@pytest.mark.parametrize(
    ("known", "img_size", "batch_size", "num_epochs"),
    [
        ({}, 96, 32, 18),
        ({"num_gpus": 1}, 224, 128, 73),
        ({"num_gpus": 1, "short_side": 130}, 128, 128, 73),
        ({"short_side": 20}, 32, 32, 18),
        ({"num_images": 60}, 96, 4, 100),
        ({"num_images": 1_000_000}, 96, 32, 10),
    ],
)
def test_the_recipe_fits_itself(
    known: dict[str, object], img_size: int, batch_size: int, num_epochs: int
) -> None:
    run = folder(facts(**known))
    assert run.model.img_size == img_size
    assert run.data.batch_size == batch_size
    assert run.optim.num_epochs == num_epochs
    assert run.scale.use_gpu == bool(known.get("num_gpus"))


def test_the_recipe_takes_any_model_and_weights() -> None:
    assert "depth" in folder(facts()).model.kwargs
    # Weights are of the whole network.
    assert "depth" not in folder(facts(init_from="file.pth")).model.kwargs
    model = folder(facts(model="resnet18")).model
    assert (model.pooling, dict(model.kwargs)) == (None, {})
    fixed = folder(facts(model="vit_tiny_patch16_224")).model
    assert build_model(fixed, num_classes=3)(torch.zeros(1, 3, 96, 96)).shape == (1, 3)
    fitted = load_recipe("finetune.folder", facts=facts(model="resnet18"))
    assert fitted.model.name == "resnet18"
    assert load_recipe("demo", facts=facts()) == load_recipe("demo")
