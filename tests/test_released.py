"""Reading weights to start from: checkpoints, files and folders, near and far."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import save_for_hf  # pyright: ignore[reportPrivateImportUsage]
from torch import Tensor, nn

from pipelines.checkpoints.snapshot import EMA_FILE, MANIFEST, MODEL_FILE
from pipelines.checkpoints.weight_sources import read_start
from pipelines.storage import retry
from tests.bucket_sets import ROOT, upload
from tests.s3_server import Line, s3_server
from tests.test_initial import CLASSES, keep

WEIGHTS = {"fc.weight": torch.ones(3, 2), "fc.bias": torch.arange(3.0)}
AVERAGE = {name: 2 * weight for name, weight in WEIGHTS.items()}


NOTHING = r"expected a checkpoint folder with checkpoint\.json, a folder with config"


def wrapped(prefix: str) -> dict[str, Tensor]:
    return {prefix + name: weight for name, weight in WEIGHTS.items()}


FILES: dict[str, Callable[[Path], None]] = {
    "plain.safetensors": lambda path: save_file(WEIGHTS, path),
    "wrapped.safetensors": lambda path: save_file(wrapped("module."), path),
    "plain.pth": lambda path: torch.save(WEIGHTS, path),
    "pytorch_model.bin": lambda path: torch.save(wrapped("module."), path),
    "model_best.pth.tar": lambda path: torch.save(
        {"state_dict": wrapped("module."), "state_dict_ema": None, "epoch": 3}, path
    ),
    "compiled.pt": lambda path: torch.save(
        {"model": wrapped("_orig_mod."), "optimizer": {"state": {}}}, path
    ),
    "averaged.pth.tar": lambda path: torch.save(
        {"state_dict": WEIGHTS, "state_dict_ema": AVERAGE}, path
    ),
    "deit.pth": lambda path: torch.save({"model": WEIGHTS, "model_ema": AVERAGE}, path),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_gives_its_weights_and_rather_their_average(
    name: str, tmp_path: Path
) -> None:
    FILES[name](tmp_path / name)
    start = read_start(str(tmp_path / name))
    assert start.is_average == (name in ("averaged.pth.tar", "deit.pth"))
    wanted = AVERAGE if start.is_average else WEIGHTS
    assert start.weights.keys() == wanted.keys()
    assert all(torch.equal(start.weights[name], wanted[name]) for name in wanted)
    assert start.classes is None


def timm_folder(folder: Path, **described: Any) -> nn.Module:
    """Write a folder as timm does for Hugging Face."""
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=3)
    both: Any = "both"
    save_for_hf(model, str(folder), model_config=described, safe_serialization=both)
    return model


@pytest.mark.parametrize("described", [{}, {"label_names": ["cat", "dog", "eel"]}])
def test_a_folder_of_timms_gives_weights_and_what_classes_it_names(
    described: dict[str, Any], tmp_path: Path
) -> None:
    model = timm_folder(tmp_path, **described)
    (tmp_path / "pytorch_model.bin").rename(tmp_path / "pytorch_model.kept")
    start = read_start(str(tmp_path))
    assert start.classes == (CLASSES if described else None)
    weights = model.state_dict()
    assert all(torch.equal(start.weights[name], weights[name]) for name in weights)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=NOTHING):
        read_start(str(tmp_path))
    (tmp_path / "pytorch_model.kept").rename(tmp_path / "pytorch_model.bin")
    assert read_start(str(tmp_path)).weights.keys() == weights.keys()
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(
        ValueError, match=r"config\.json: expected a model's description"
    ):
        read_start(str(tmp_path))


def test_what_is_no_start_is_refused_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("none")
    for name in ("notes", "nothing", "nothing.pth", ""):
        with pytest.raises(ValueError, match=NOTHING):
            read_start(str(tmp_path / name))
    # Of a checkpoint that was cut off, the weights may be whole.
    save_file(WEIGHTS, tmp_path / MODEL_FILE)
    with pytest.raises(ValueError, match=NOTHING):
        read_start(str(tmp_path))
    for name in ("plain.safetensors", "plain.pth"):
        path = tmp_path / name
        FILES[name](path)
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(ValueError, match=name) as caught:
            read_start(str(path))
        assert "\n" not in str(caught.value)
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    with pytest.raises(
        ValueError, match=r"empty\.pth: expected a state dict of tensors"
    ):
        read_start(str(tmp_path / "empty.pth"))


@pytest.mark.parametrize("spoil", [Path.unlink, lambda path: path.write_bytes(b"x")])
def test_a_checkpoint_is_refused_for_the_file_that_is_needed(
    spoil: Callable[[Path], object], tmp_path: Path
) -> None:
    keep(tmp_path)
    spoil(tmp_path / MODEL_FILE)
    assert read_start(str(tmp_path)).is_average
    spoil(tmp_path / EMA_FILE)
    with pytest.raises(ValueError, match=f"{EMA_FILE}: expected .* is damaged"):
        read_start(str(tmp_path))


@pytest.fixture(scope="module")
def line() -> Iterator[Line]:
    with pytest.MonkeyPatch.context() as patch, s3_server() as line:
        patch.setattr(retry, "_WAITS_S", (0.001,) * 4)
        yield line


def test_of_a_bucket_the_one_file_that_is_needed_is_fetched(
    tmp_path: Path, line: Line
) -> None:
    keep(tmp_path / "ours")
    timm_folder(tmp_path / "timm", label_names=list(CLASSES))
    for name in ("ours", "timm"):
        upload(tmp_path / name, f"{ROOT}/{name}")
    FILES["averaged.pth.tar"](tmp_path / "ours" / "theirs.pth.tar")
    upload(tmp_path / "ours", f"{ROOT}/files")
    line.taken()
    line.fail(rf"GET .*{EMA_FILE}", num=1, fault="cut within")
    assert read_start(f"{ROOT}/ours").classes == CLASSES
    fetched = {request.split("?")[0] for request in line.taken() if "GET" in request}
    assert fetched == {f"GET /bucket/ours/{name}" for name in (MANIFEST, EMA_FILE)}

    assert read_start(f"{ROOT}/timm").classes == CLASSES
    line.taken()
    start = read_start(f"{ROOT}/files/theirs.pth.tar?region=us-east-1")
    assert start.is_average
    assert torch.equal(start.weights["fc.bias"], AVERAGE["fc.bias"])
    assert sum("GET" in request for request in line.taken()) == 1


def test_a_bucket_without_it_is_named_without_its_secrets(line: Line) -> None:
    address = "s3://me:word@bucket/none"
    for place in (address, f"{address}/model.pth", f"{address}/model.safetensors"):
        with pytest.raises(ValueError, match="got 's3://bucket/none") as caught:
            read_start(place)
        assert "word" not in str(caught.value)


def test_a_manifest_that_is_damaged_is_no_folder_of_timms(tmp_path: Path) -> None:
    keep(tmp_path)
    raw = json.loads((tmp_path / MANIFEST).read_text())
    (tmp_path / MANIFEST).write_text(json.dumps(raw | {"classes": ["a", "b", "c"]}))
    with pytest.raises(ValueError, match="expected a whole manifest"):
        read_start(str(tmp_path))
