"""Starting from another training's weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import sovit
from pipelines.checkpoints.pretrained import load_initial
from pipelines.checkpoints.snapshot import save_checkpoint
from pipelines.config import Data, Model, Optim, Probe, Run
from pipelines.data.batch import Position
from pipelines.driver.preflight import check_run
from pipelines.training.model import build_model
from sovit.architectures.vit import sinusoid_table
from tests.small_sets import write_set

CLASSES = ("cat", "dog", "eel")
MODEL = Model(
    name="so_vit_7",
    img_size=32,
    pooling=sovit.Pooling(reduced_dim=(6, 4)),
    kwargs={"depth": 1, "embed_dim": 32, "num_heads": 2},
)
RUN = Run(
    recipe="small",
    model=MODEL,
    data=Data(train="a", val="b", batch_size=8),
    optim=Optim(lr=0.1, num_epochs=5),
)


def build(*, seed: int, num_classes: int = 3, **changes: Any) -> nn.Module:
    torch.manual_seed(seed)
    model = dataclasses.replace(MODEL, **changes)
    return build_model(model, num_classes=num_classes)


def keep(folder: Path) -> None:
    """Write a checkpoint whose weights and average are of models of two seeds."""
    folder.mkdir(exist_ok=True)
    save_checkpoint(
        folder,
        run=RUN,
        position=Position(),
        classes=CLASSES,
        metrics={},
        model=build(seed=0),
        ema=build(seed=1),
        optimizer=None,
    )


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    keep(tmp_path)
    return tmp_path


def test_the_average_is_taken_with_its_classifier(kept: Path) -> None:
    model, average = build(seed=2), build(seed=1).state_dict()
    assert load_initial(model, str(kept), classes=CLASSES)
    for name, value in model.state_dict().items():
        assert torch.equal(value, average[name]), name


@pytest.mark.parametrize("classes", [("cat", "dog"), ("eel", "dog", "cat")])
def test_other_classes_get_a_fresh_classifier(
    kept: Path, classes: tuple[str, ...]
) -> None:
    model = build(num_classes=len(classes), seed=2)
    own, average = dict(model.state_dict()), build(seed=1).state_dict()
    own = {name: value.clone() for name, value in own.items()}
    assert not load_initial(model, str(kept), classes=classes)
    for name, value in model.state_dict().items():
        source = own if name.startswith("head.fc") else average
        assert torch.equal(value, source[name]), name


@pytest.mark.parametrize("size", [64, (96, 48)])
def test_positions_of_another_image_size_are_fitted(
    kept: Path, size: int | tuple[int, int]
) -> None:
    model = build(seed=2)
    assert isinstance(model, sovit.SoViT)
    model.set_input_size(size)
    load_initial(model, str(kept), classes=CLASSES)
    height, width = size if isinstance(size, tuple) else (size, size)
    table = sinusoid_table(height // 16 * (width // 16) + 1, 32)
    assert torch.equal(model.get_buffer("pos_embed"), table)
    assert model(torch.randn(2, 3, height, width)).shape == (2, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kwargs": {**MODEL.kwargs, "depth": 2}}, r"tensors missing: blocks\.1\."),
        ({"pooling": sovit.Pooling(reduced_dim=8)}, r"another shape: head\.fc_visual"),
        (
            {"pooling": sovit.Pooling(reduced_dim=(6, 4), start="ones")},
            r"unexpected: head\.pool\.normalize\.start; set --model\.name",
        ),
    ],
)
def test_another_model_is_refused_by_its_tensors(
    kept: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load_initial(build(seed=2, **changes), str(kept), classes=CLASSES)


def test_a_run_is_checked_against_its_start_before_it_begins(
    kept: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shards = write_set(tmp_path / "set", groups=[[8]], num_classes=2)
    run = dataclasses.replace(
        RUN,
        model=dataclasses.replace(MODEL, init_from=str(kept)),
        data=dataclasses.replace(RUN.data, train=shards, val=shards),
        probe=Probe(every_steps=5),
    )
    with caplog.at_level("INFO", logger="pipelines"):
        check_run(run)
    assert caplog.messages == [
        f"starting from the moving average of {kept}; the classifier starts fresh: it "
        "was trained for other classes"
    ]
    deeper = dataclasses.replace(run.model, kwargs={**MODEL.kwargs, "depth": 2})
    with pytest.raises(ValueError, match=r"tensors missing: blocks\.1\."):
        check_run(dataclasses.replace(run, model=deeper))
    probe = Probe(every_steps=5, stem="maxpool")
    with pytest.raises(ValueError, match=r"got 'maxpool'.*patch_embed"):
        check_run(dataclasses.replace(run, probe=probe))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            dataclasses.replace(MODEL, img_size=50),
            "img_size: expected a multiple of 16",
        ),
        (
            Model(name="vit_tiny_patch16_224", img_size=48, kwargs={"depth": 1}),
            r"model\.img_size: expected a size that vit_tiny.* takes, got 48 \(Assert",
        ),
    ],
)
def test_images_that_the_model_does_not_take_are_refused_before(
    model: Model, message: str, tmp_path: Path
) -> None:
    shards = write_set(tmp_path / "set", groups=[[8]], num_classes=2)
    data = dataclasses.replace(RUN.data, train=shards, val=shards)
    with pytest.raises(ValueError, match=message):
        check_run(dataclasses.replace(RUN, model=model, data=data))
