"""Starting from another training's weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import sovit
from pipelines.checkpoint import Position, build_model, save_checkpoint
from pipelines.config import Data, Model, Optim, Probe, Run
from pipelines.initial import load_initial
from pipelines.preflight import check_run
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


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    save_checkpoint(
        tmp_path,
        run=RUN,
        position=Position(),
        classes=CLASSES,
        metrics={},
        model=build(seed=0),
        ema=build(seed=1),
        optimizer=None,
    )
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


def test_positions_of_another_image_size_are_fitted(kept: Path) -> None:
    model = build(seed=2, img_size=64)
    load_initial(model, str(kept), classes=CLASSES)
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 3)


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
        f"the classifier starts fresh: {kept} was trained for other classes"
    ]
    deeper = dataclasses.replace(run.model, kwargs={**MODEL.kwargs, "depth": 2})
    with pytest.raises(ValueError, match=r"tensors missing: blocks\.1\."):
        check_run(dataclasses.replace(run, model=deeper))
    probe = Probe(every_steps=5, stem="maxpool")
    with pytest.raises(ValueError, match=r"got 'maxpool'.*patch_embed"):
        check_run(dataclasses.replace(run, probe=probe))


def test_a_folder_without_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="wanted a checkpoint folder"):
        load_initial(build(seed=2), str(tmp_path), classes=CLASSES)
