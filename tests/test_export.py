"""A run trains, and its model answers in timm, torch.export and ONNX as before."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from mlflow import MlflowClient
from timm.data.config import resolve_model_data_config
from torch import Tensor

from pipelines import tracking
from pipelines.checkpoints.manifest import load_model
from pipelines.driver.fit import fit
from pipelines.export import checks
from pipelines.export.command import Options, export_checkpoint
from pipelines.export.folder import MARK
from pipelines.export.images import read_images
from tests.demo_runs import small_demo
from tests.exports import ROOT, Trained, blocks


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("run")
    run = small_demo(folder, num_epochs=2, num_workers=0, token_embed="resnet")
    # Fast enough for both weights to tell classes apart after 20 steps.
    optim = dataclasses.replace(run.optim, lr=5e-3, warmup_epochs=0, ema_decay=0.5)
    optim = dataclasses.replace(optim, mixup=0.0, cutmix=0.0)
    found = fit(dataclasses.replace(run, optim=optim), name="small")
    assert found.checkpoint is not None
    return Trained(run=run, checkpoint=Path(str(found.checkpoint)))


@pytest.fixture(scope="module")
def exported(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("at") / "exported"
    options = Options(
        checkpoint=str(trained.checkpoint),
        out=str(out),
        images=(trained.run.data.val,),
    )
    written = export_checkpoint(options)
    assert list(written) == ["timm", "torch", "onnx"]
    for of_format in written.values():
        assert set(of_format["difference"]) == {checks.RANDOM, checks.IMAGES}
    assert set(written["timm"]["difference"].values()) == {0}
    return out


@pytest.fixture(scope="module")
def held_out(trained: Trained) -> Tensor:
    encoded = [image.content for image in read_images([trained.run.data.val])]
    assert len(encoded) == 101
    return trained.pixels(*encoded)


def test_a_run_registers_its_model_at_its_end(trained: Trained) -> None:
    """The run that the tests below export."""
    metrics = load_model(trained.checkpoint)[1].metrics
    assert metrics["val/num_images"] == 101
    client = MlflowClient(tracking.default_uri(trained.run.storage))
    (version,) = client.search_model_versions("name='small'")
    assert float(version.tags["val/top1"]) == metrics["val/top1"]
    best = client.get_model_version_by_alias("small", "best")
    assert best.version == version.version


def test_onnx_names_the_same_five_classes_as_torch(
    trained: Trained, exported: Path, held_out: Tensor
) -> None:
    """From training through the export to another runtime, on every held-out image."""
    session: Any = onnxruntime.InferenceSession(
        str(exported / "model.onnx"), providers=["CPUExecutionProvider"]
    )
    (found,) = session.run(["logits"], {"images": held_out.numpy()})
    wanted = trained.logits(held_out)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)
    top = np.argsort(-found, axis=1, kind="stable")[:, :5]
    assert np.array_equal(top, wanted.topk(5).indices)
    assert len(np.unique(top[:, 0])) > 3  # it has learnt to tell some apart


def test_timm_gives_the_very_same_logits_of_either_weights(
    trained: Trained, exported: Path, held_out: Tensor, tmp_path: Path
) -> None:
    raw = tmp_path / "raw"
    export_checkpoint(
        Options(
            checkpoint=str(trained.checkpoint),
            out=str(raw),
            formats=("timm",),
            weights="raw",
        )
    )
    for folder, weights in ((exported, "ema"), (raw, "raw")):
        model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        with torch.inference_mode():
            found = model(held_out)
        assert torch.equal(found, trained.logits(held_out, ema=weights == "ema"))
        kept = json.loads((folder / MARK).read_text())
        assert kept["card"]["weights"] == weights


def test_the_program_takes_any_number_of_images(
    trained: Trained, exported: Path, held_out: Tensor
) -> None:
    loaded: Any = torch.export.load(exported / "model.pt2").module()
    wanted = trained.logits(held_out)
    for num in (1, 2, 101):
        torch.testing.assert_close(loaded(held_out[:num]), wanted[:num])


def test_every_format_says_how_images_are_prepared(
    trained: Trained, exported: Path
) -> None:
    data, classes = trained.run.data, load_model(trained.checkpoint)[1].classes
    wanted: dict[str, Any] = {
        "img_size": 32,
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "mean": list(data.mean),
        "std": list(data.std),
        "eval_mirror": False,
        "exif": "ignore",
        "classes": list(classes),
        "recipe": "small",
    }
    extra_files = {"card.json": ""}
    torch.export.load(exported / "model.pt2", extra_files=extra_files)
    of_program = json.loads(extra_files["card.json"])
    assert {name: of_program[name] for name in wanted} == wanted
    session = onnxruntime.InferenceSession(str(exported / "model.onnx"))
    texts = session.get_modelmeta().custom_metadata_map
    for name, value in wanted.items():
        text = texts[name]
        assert (text if isinstance(value, str) else json.loads(text)) == value
    model: Any = timm.create_model(f"local-dir:{exported}", pretrained=True)
    found = resolve_model_data_config(model)
    assert found["input_size"] == (3, 32, 32)
    assert (found["crop_pct"], found["interpolation"]) == (1.0, "bicubic")
    assert (*found["mean"], *found["std"]) == (*data.mean, *data.std)
    assert tuple(model.pretrained_cfg["label_names"]) == classes


def test_no_file_says_where_it_was_made(exported: Path) -> None:
    for file in exported.iterdir():  # model.pt2 is an archive that does not compress
        content = file.read_bytes()
        assert str(ROOT).encode() not in content, file.name
        assert str(exported.parent).encode() not in content, file.name


def test_the_pages_lines_load_each_format(
    exported: Path, held_out: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(exported.parent)
    for_all, by_name, after_meta = blocks("### timm")
    found: dict[str, Any] = {}
    exec(for_all, found)
    assert found["model"].num_classes == 10
    exec(by_name, found)
    assert found["model"].num_classes == 1000
    exec(after_meta, found)
    (of_program,) = blocks("### torch.export")
    found = {"images": held_out[:3]}
    for name in list(sys.modules):  # it needs PyTorch alone
        if name.partition(".")[0] in ("timm", "sovit", "pipelines"):
            monkeypatch.setitem(sys.modules, name, None)
    exec(of_program, found)
    assert found["logits"].shape == (3, len(found["card"]["classes"]))
