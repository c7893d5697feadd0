"""Checkpoints: what was written comes back, and what is damaged is refused."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

import sovit
from pipelines.checkpoints.manifest import (
    load_model,
    load_optimizer,
    load_weights,
    read_manifest,
)
from pipelines.checkpoints.snapshot import (
    EMA_FILE,
    MANIFEST,
    MODEL_FILE,
    OPTIMIZER_FILE,
    save_checkpoint,
)
from pipelines.config import Model
from pipelines.data.batch import Position
from pipelines.training.model import build_model
from tests.small_runs import SO_VIT, plain, small_run, state_of

RUN = small_run("none", model=SO_VIT, ema_decay=0.9)
POSITION = Position(epoch=3, batch=2, step=17)
METRICS = {"val/top1": 12.5, "val/loss": 1.25e-7}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path)
    return tmp_path


def write(folder: Path, *, ema: bool = True, optimizer: bool = True) -> Any:
    state = state_of(RUN)
    images = torch.randn(4, 3, 32, 32)
    state.model(images).sum().backward()
    state.optimizer.step()
    assert state.ema is not None
    save_checkpoint(
        folder,
        run=RUN,
        position=POSITION,
        classes=("a", "b", "ç"),
        metrics=METRICS,
        model=state.model,
        ema=state.ema.module if ema else None,
        optimizer=state.optimizer if optimizer else None,
    )
    return state


def equal(found: dict[str, Any], wanted: dict[str, Any]) -> bool:
    same = found.keys() == wanted.keys()
    return same and all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_everything_comes_back(tmp_path: Path) -> None:
    state = write(tmp_path)
    manifest = read_manifest(tmp_path)
    assert manifest.run == RUN
    assert manifest.position == POSITION
    assert manifest.classes == ("a", "b", "ç")
    assert manifest.metrics == METRICS
    assert set(manifest.files) == {MODEL_FILE, EMA_FILE, OPTIMIZER_FILE}
    assert sorted(os.listdir(tmp_path)) == sorted([MANIFEST, *manifest.files])
    other = state_of(RUN, seed=5)
    assert not equal(plain(other.model), plain(state.model))
    load_weights(other.model, tmp_path)
    assert equal(plain(other.model), plain(state.model))
    load_weights(other.model, tmp_path, ema=True)
    assert equal(plain(other.model), plain(state.ema.module))
    load_optimizer(other.optimizer, tmp_path)
    wanted = state.optimizer.state_dict()
    for number, slots in other.optimizer.state_dict()["state"].items():
        assert equal(slots, wanted["state"][number])


def test_the_average_is_loaded_where_there_is_one(tmp_path: Path) -> None:
    state = write(tmp_path)
    averaged, manifest = load_model(tmp_path)
    assert not averaged.training
    assert manifest.position == POSITION
    assert equal(plain(averaged), plain(state.ema.module))
    assert equal(plain(load_model(tmp_path, ema=False)[0]), plain(state.model))


def test_a_run_without_an_average_loads_its_weights(tmp_path: Path) -> None:
    state = write(tmp_path, ema=False, optimizer=False)
    assert sorted(os.listdir(tmp_path)) == [MANIFEST, MODEL_FILE]
    assert equal(plain(load_model(tmp_path)[0]), plain(state.model))
    with pytest.raises(ValueError, match="--no-ema"):
        load_model(tmp_path, ema=True)


FILES = [MODEL_FILE, EMA_FILE, OPTIMIZER_FILE]


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
@pytest.mark.parametrize("damage", ["cut", "longer", "flipped", "empty"])
def test_a_damaged_file_is_refused_by_name(
    folder: Path, name: str, damage: str
) -> None:
    path = folder / name
    content = path.read_bytes()
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :]
    changed = {
        "cut": content[:-1],
        "longer": content + b"\n{}",
        "flipped": flipped,
        "empty": b"",
    }
    path.write_bytes(changed[damage])
    with pytest.raises(ValueError, match="this checkpoint is damaged") as caught:
        read_manifest(folder)
    assert str(path) in str(caught.value)


def test_every_bit_of_the_manifest_counts(folder: Path) -> None:
    path = folder / MANIFEST
    raw = json.loads(path.read_text())
    raw["position"]["step"] += 1
    path.write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=MANIFEST):
        read_manifest(folder)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_refused_by_name(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(ValueError, match=f"{name}: expected .* got None"):
        read_manifest(folder)


def test_a_folder_without_a_manifest_is_no_checkpoint(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(ValueError, match=f"{MANIFEST}, got {folder}"):
            read_manifest(folder)


def test_a_write_that_was_stopped_leaves_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path)
    assert not (tmp_path / MANIFEST).exists()
    with pytest.raises(ValueError, match="expected a checkpoint folder"):
        read_manifest(tmp_path)


class Foreign:
    """What must never be unpickled."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ("touch unpickled",)


@pytest.mark.parametrize("damage", ["foreign", "garbage", "missing"])
def test_an_optimizer_file_of_other_objects_is_refused(
    folder: Path, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    path = folder / OPTIMIZER_FILE
    if damage == "foreign":
        torch.save({"state": Foreign(), "param_groups": []}, path)
    elif damage == "garbage":
        path.write_bytes(b"not a file of torch")
    else:
        path.unlink()
    with pytest.raises(ValueError, match=OPTIMIZER_FILE):
        load_optimizer(state_of(RUN).optimizer, folder)
    assert not (folder / "unpickled").exists()


def test_models_are_built_as_their_settings_say() -> None:
    model = build_model(SO_VIT, num_classes=7)
    assert isinstance(model, sovit.SoViT)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 7)
    other = dataclasses.replace(SO_VIT, img_size=48)
    assert build_model(other, num_classes=7)(torch.randn(2, 3, 48, 48)).shape == (2, 7)
    timms = build_model(Model(name="test_resnet"), num_classes=4).eval()
    assert type(timms) is type(timm.create_model("test_resnet"))
    assert timms(torch.randn(1, 3, 32, 32)).shape == (1, 4)
    with pytest.raises(ValueError, match=r"model\.name: .* 'no_such_model'"):
        build_model(Model(name="no_such_model"), num_classes=2)
