"""Every kind of network goes to timm, and to ONNX where it has the operators."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

import sovit
from pipelines.config import Data, Model
from pipelines.export import checks, command, onnx_file, program
from pipelines.export.command import Options, export_checkpoint
from pipelines.export.folder import MARK
from pipelines.export.subject import Subject
from sovit.pooling import build_pooling
from tests.exports import TINY, Trained, blocks, refused, untrained
from tests.small_sets import jpeg

SMALL = sovit.Pooling.named("isqrt_cov", reduced_dim=8)
BACKBONE = Model(
    name="isqrt_resnet18",
    img_size=64,
    pooling=sovit.Pooling.named("isqrt_cov", reduced_dim=8, num_iterations=3),
    kwargs={"layers": (1, 1, 1, 1), "drop_rate": 0.1},  # pyright: ignore
)
NETWORKS = {
    "heads of two classifiers": Model(name="sot_tiny", img_size=32, kwargs={**TINY}),
    "a head of one": Model(
        name="so_vit_7", img_size=48, kwargs={**TINY, "fusion": "concat"}
    ),
    "a backbone of timm": BACKBONE,
    "timm's own of one size": Model(
        name="test_vit", img_size=32, kwargs={"img_size": 32}
    ),
    "timm's own of any size": Model(name="test_resnet", img_size=64),
    "a head on a map": Model(name="test_convnext", img_size=64, pooling=SMALL),
    "a head on tokens": Model(
        name="test_vit", img_size=32, pooling=SMALL, kwargs={"fusion": "concat"}
    ),
}


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Trained, Path]:
    """Export a network whose images are resized, as if it were of gigabytes."""
    at = tmp_path_factory.mktemp("backbone")
    subject = untrained(at / "checkpoint", BACKBONE, noise=0.03)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(onnx_file, "_MAX_BYTES", 1000)
        command._main([str(subject.checkpoint), str(at / "a"), "--formats", "onnx"])
    # Moved as a whole, it still finds its weights.
    return subject, (at / "a").rename(at / "exported")


@pytest.mark.parametrize("kind", NETWORKS)
def test_timm_loads_every_kind_of_network(kind: str, tmp_path: Path) -> None:
    subject = untrained(tmp_path / "checkpoint", NETWORKS[kind])
    out = tmp_path / "out"
    options = Options(
        checkpoint=str(subject.checkpoint), out=str(out), formats=("timm",)
    )
    export_checkpoint(options)
    pixels = subject.pixels(*(jpeg(i, size=(90, 61)) for i in range(4)))
    wanted = subject.logits(pixels, ema=False)
    config = json.loads((out / "config.json").read_text())
    overlay = {**config["pretrained_cfg"], "file": str(out / "model.safetensors")}
    by_name = {"pretrained": True, "pretrained_cfg_overlay": overlay}
    of_folder = timm.create_model(f"local-dir:{out}", pretrained=True)
    of_name = timm.create_model(
        config["architecture"], **by_name, **config["model_args"]
    )
    for model in (of_folder, of_name):
        with torch.inference_mode():
            assert torch.equal(model.eval()(pixels), wanted)
    # Other classes: all but the classifiers is kept, so their names must be right.
    args = {**config["model_args"], "num_classes": 7}
    other = timm.create_model(config["architecture"], **by_name, **args)
    names = config["pretrained_cfg"]["classifier"]
    names = (names,) if isinstance(names, str) else tuple(names)
    kept = of_folder.state_dict()
    for name, value in other.state_dict().items():
        assert torch.equal(value, kept[name]) != name.startswith(names), name


def test_the_pages_script_prepares_images_without_us(
    backbone: tuple[Trained, Path],
) -> None:
    """With onnxruntime, NumPy and Pillow: evaluation's pixels within a level."""
    subject, out = backbone
    files = {"model.onnx", "model.onnx.data", MARK}
    assert {path.name for path in out.iterdir()} == files
    (script,) = blocks("### ONNX")
    hidden = "('torch', 'timm', 'sovit', 'pipelines')"
    script = f"import sys\nsys.modules.update(dict.fromkeys({hidden}))\n{script}"
    for name, size in (("wide", (90, 61)), ("tall", (71, 140))):
        encoded = jpeg(3, size=size)
        (out.parent / "photo.jpg").write_bytes(encoded)
        done = subprocess.run(
            [sys.executable, "-c", f"{script}np.save('{name}.npy', pixels)"],
            cwd=out.parent,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        pixels = subject.pixels(encoded)
        levels = 255 * np.array(subject.run.data.std)[:, None, None]
        found = np.load(out.parent / f"{name}.npy")
        assert np.abs((found - pixels[0].numpy()) * levels).max() < 1.01
        odds = subject.logits(pixels, ema=False).softmax(-1)[0].tolist()
        lines = [line.split() for line in done.stdout.splitlines()]
        said = {label: float(text) for text, label in lines}
        wanted = dict(zip("abc", odds, strict=True))
        assert said == pytest.approx(wanted, abs=2e-3)


def test_a_decomposition_is_refused_for_onnx(tmp_path: Path) -> None:
    pooling = sovit.Pooling.named("mpn_cov", reduced_dim=8)
    settings = Model(name="so_vit_7", img_size=32, pooling=pooling, kwargs={**TINY})
    subject = untrained(tmp_path / "checkpoint", settings)
    match = r"got one by eigenvalues .* --formats timm torch"
    refused(subject, tmp_path / "out", match, formats=("onnx",))


class OtherPoolings(nn.Module):
    """Pool a few tokens by what the networks above have not."""

    def __init__(self) -> None:
        super().__init__()
        sides: dict[str, Any] = {"type": "cross_cov", "reduced_dim": (3, 2)}
        roots = {"normalizer": "newton_schulz", "num_iterations": 2}
        settings: list[dict[str, Any]] = [
            {**sides, "num_iterations": 2, "num_singular_values": None},
            *({**sides, "normalizer": name} for name in ("signed_sqrt", "layer_norm")),
            # Of fewer tokens than channels, so by the Gram matrix.
            {"type": "gaussian", "reduced_dim": 8, **roots},
        ]
        self.stem = nn.Conv2d(3, 8, 2)
        self.pools = nn.ModuleList(
            build_pooling(sovit.Pooling(**fields), embed_dim=8) for fields in settings
        )

    def forward(self, images: Tensor) -> Tensor:
        """Return what all give, of four tokens."""
        tokens = self.stem(images).flatten(2).mT
        return torch.cat([pool(tokens) for pool in self.pools], dim=-1)


def test_other_poolings_go_to_onnx_with_any_batch(tmp_path: Path) -> None:
    torch.manual_seed(0)
    subject = Subject(
        model=OtherPoolings().eval(),
        settings=Model(name="so_vit_7", img_size=3),
        data=Data(train="t", val="v", batch_size=8),
        classes=(),
        origin={},
    )
    file = tmp_path / "model.onnx"
    onnx_file.write_onnx(file, program.to_program(subject), card={})
    cases = checks.make_cases(subject.model, img_size=3)
    found = checks.check("a", onnx_file.load_onnx(file), cases=cases, tolerance=1e-5)
    assert found[checks.RANDOM] > 0  # it ran elsewhere
