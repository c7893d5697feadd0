"""Any timm name and a pooling: trained, gone on with, exported, and answered from."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import timm
import torch

import sovit
from pipelines import predict, train
from pipelines.checkpoints.manifest import load_model
from pipelines.config import Model
from pipelines.config.serialization import to_json
from pipelines.errors import StoppedEarly
from pipelines.export import command
from pipelines.export.images import read_images
from pipelines.training.model import build_model
from sovit import SecondOrderNet
from sovit.architectures.backbones import ARCHITECTURE
from tests.demo_runs import RECIPE, part_of_demo, small_demo
from tests.exports import Trained, untrained
from tests.mlflow_stores import prepare_store
from tests.test_alone import Reports

# Four positions of 64 pixels a side: as many as the covariance is wide.
POOLING = sovit.Pooling.named("isqrt_cov", reduced_dim=4)
CONVNEXT = Model(name="test_convnext", img_size=64, pooling=POOLING)
VIT = Model(
    name="test_vit",
    img_size=32,
    pooling=sovit.Pooling.named("svpn", reduced_dim=(6, 4)),
    kwargs={"fusion": "concat"},
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Train a ConvNeXt with an iSQRT head by its recipe: an epoch, and one later."""
    folder = tmp_path_factory.mktemp("run")
    run = small_demo(folder / "sets", num_epochs=2, num_workers=0)
    few = part_of_demo(folder / "few", split="train", num_rows=24)
    data = dataclasses.replace(run.data, train=str(few), val=str(few), batch_size=8)
    run = dataclasses.replace(run, model=CONVNEXT, data=data)
    prepare_store(run.storage)
    (folder / "run.json").write_text(to_json(run))
    (folder / "recipe.py").write_text(RECIPE)
    recipe = train.load_recipe(f"{folder}/recipe.py:small")
    with pytest.raises(StoppedEarly):
        train.fit(recipe, name="mine", callbacks=[Reports(last=1)])
    train._main(["--resume", "mine", "--storage", run.storage])
    return Trained(run=run, checkpoint=Path(run.storage, "mine", "epoch_0002"))


@pytest.fixture(params=["convolutions", "tokens"])
def subject(request: pytest.FixtureRequest, tmp_path: Path) -> Trained:
    if request.param == "tokens":
        return untrained(tmp_path / "checkpoint", VIT)
    return request.getfixturevalue("trained")


def test_every_way_gives_the_same_logits(
    subject: Trained, trained: Trained, tmp_path: Path, capsys: Any
) -> None:
    out, hub = tmp_path / "out", tmp_path / "hub"
    command._main([str(subject.checkpoint), str(out), "--formats", "timm", "onnx"])
    assert "`import sovit` before timm loads it" in capsys.readouterr().out
    images = list(read_images([trained.run.data.val]))[:5]
    pixels = subject.pixels(*(image.content for image in images))
    model, manifest = load_model(subject.checkpoint)
    assert isinstance(model, SecondOrderNet)
    of_timm = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    timm.models.save_for_hf(of_timm, str(hub))
    of_hub = timm.create_model(f"local-dir:{hub}", pretrained=True).eval()
    with torch.inference_mode():
        wanted = model(pixels)
        assert torch.equal(of_timm(pixels), wanted)
        assert torch.equal(of_hub(pixels), wanted)
    session: Any = onnxruntime.InferenceSession(
        str(out / "model.onnx"), providers=["CPUExecutionProvider"]
    )
    (found,) = session.run(["logits"], {"images": pixels.numpy()})
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)
    answers = [
        list(predict.predict(predict.load_subject(str(place)), images))
        for place in (subject.checkpoint, out, hub)
    ]
    assert answers[1] == answers[2] == answers[0]
    odds = dict(zip(manifest.classes, wanted.softmax(-1)[0].tolist(), strict=True))
    for label, score in answers[0][0].top:
        assert score == pytest.approx(odds[label], rel=1e-5)


def test_the_folder_says_that_it_needs_sovit(trained: Trained, tmp_path: Path) -> None:
    out, plain = tmp_path / "out", tmp_path / "plain"
    command._main([str(trained.checkpoint), str(out), "--formats", "timm"])
    card = (out / "README.md").read_text()
    config = json.loads((out / "config.json").read_text())
    for text in (card, config["sovit"]["needs"]):
        assert f"timm alone says Unknown model ({ARCHITECTURE})" in text
    assert config["model_args"]["backbone"] == "test_convnext"
    of_timm = untrained(tmp_path / "c", Model(name="test_resnet", img_size=32))
    command._main([str(of_timm.checkpoint), str(plain), "--formats", "timm"])
    assert "sovit" not in (plain / "README.md").read_text()
    assert "needs" not in json.loads((plain / "config.json").read_text())["sovit"]


def test_the_dry_run_says_what_was_put_on_what(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.json").write_text(to_json(trained.run))
    (tmp_path / "recipe.py").write_text(RECIPE)
    train._main([f"{tmp_path}/recipe.py:small", "--dry-run"])
    said = capsys.readouterr().out
    assert "model       test_convnext with a second-order head (cov), 64x64" in said
    num_reduced, num_classified = 64 * 4 + 2 * 4, (4 * 5 // 2 + 1) * 10
    assert re.search(rf"\n +head +{num_reduced + num_classified} ", said)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"name": "test_convnext"}, r"'oops': 1.*ConvNeXt.*it takes .*depths, dims"),
        (
            {"name": "test_convnext", "pooling": POOLING},
            r"'oops': 1.*it takes pooling, fusion.*depths, dims",
        ),
        ({"name": "so_vit_7"}, r"'oops': 1.*it takes .*embed_dim"),
        (
            {"name": "isqrt_resnet18", "kwargs": {"layers": 3}},
            r"'layers': 3.*TypeError.*it takes pooling.*layers",
        ),
        (
            {"name": "test_vit", "kwargs": {"num_heads": 7}},
            r"'num_heads': 7.*divisible.*it takes",
        ),
        (
            {"name": "test_convnext", "kwargs": {"dims": (-1, 2, 3, 4)}},
            r"-1.*RuntimeError.*it takes",
        ),
        (
            {"name": "vgg11", "pooling": POOLING, "drop_path_rate": 0.1, "kwargs": {}},
            r"'drop_path_rate': 0\.1.*it takes",
        ),
        (
            {"name": "eca_resnet18", "pooling": POOLING, "kwargs": {}},
            r"model\.pooling: expected none for eca_resnet18.*'backbone': "
            r"'eca_resnet18'",
        ),
        (
            {"name": ARCHITECTURE, "pooling": POOLING, "kwargs": {}},
            "expected backbone, a name that timm knows",
        ),
        (
            {"name": ARCHITECTURE, "kwargs": {"backbone": "hf-hub:a/b"}},
            r"model\.kwargs\.backbone: expected a model that timm knows",
        ),
    ],
)
def test_arguments_that_do_not_fit_are_one_line(
    settings: dict[str, Any], said: str
) -> None:
    settings = {"kwargs": {"oops": 1}, **settings}
    with pytest.raises(ValueError, match=said) as caught:
        build_model(Model(**settings), num_classes=3)
    assert "\n" not in str(caught.value)


def test_a_command_ends_with_that_line(
    trained: Trained,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = dataclasses.replace(CONVNEXT, kwargs={"oops": 1})
    run = dataclasses.replace(trained.run, model=model)
    (tmp_path / "run.json").write_text(to_json(run))
    (tmp_path / "recipe.py").write_text(RECIPE)
    arguments = ["sovit-train", f"{tmp_path}/recipe.py:small", "--name", "other"]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as caught:
        train.main()
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("sovit-train: model.kwargs: expected arguments that")


def test_what_timm_has_weights_of_is_the_backbone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def create(name: str, **kwargs: Any) -> None:
        asked.update(kwargs)

    monkeypatch.setattr(timm, "create_model", create)
    settings = dataclasses.replace(CONVNEXT, kwargs={"pretrained": True})
    build_model(settings, num_classes=3)
    assert asked["pretrained_backbone"] is True
    assert "pretrained" not in asked
