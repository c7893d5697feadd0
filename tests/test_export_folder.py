"""An export is there whole and right, or not at all, and takes nobody's place."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipelines.config import Model
from pipelines.export import checks, timm_folder
from pipelines.export.command import Options, export_checkpoint
from pipelines.export.folder import MARK, mark, whole_folder
from tests.exports import Trained, refused, untrained


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    settings = Model(name="test_vit", img_size=32, kwargs={"img_size": 32})
    return untrained(tmp_path_factory.mktemp("of") / "checkpoint", settings)


def test_above_the_tolerance_nothing_is_written(
    subject: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = timm_folder.load_with_timm

    def shifted(*args: Any, **kwargs: Any) -> Callable[[Tensor], Tensor]:
        run = load(*args, **kwargs)
        return lambda pixels: run(pixels) + 0.02

    monkeypatch.setattr(timm_folder, "load_with_timm", shifted)
    out, formats = tmp_path / "out", ("timm",)
    match = r"timm: expected .* got a difference of 2\.0e-02 on random pixels"
    refused(subject, out, match, formats=formats)
    options = Options(
        checkpoint=str(subject.checkpoint), out=str(out), formats=("timm",), tolerance=1
    )
    (of_timm,) = export_checkpoint(options).values()
    assert of_timm["difference"] == pytest.approx({checks.RANDOM: 0.02}, rel=1e-3)


def test_what_is_no_number_is_above_any_tolerance() -> None:
    pixels = torch.zeros(1, 3, 2, 2)
    cases = checks.Cases(batches={"a": [(pixels, torch.ones(1, 2))]}, num_images=0)
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="got a difference of"):
            checks.check(
                "a", lambda _, v=value: torch.full((1, 2), v), cases=cases, tolerance=9
            )
    with pytest.raises(ValueError, match="got NaN or infinite ones on random pixels"):
        checks.make_cases(torch.nn.Threshold(9.0, float("nan")), img_size=2)


def test_options_that_cannot_be_meant_are_refused(
    subject: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    refused(subject, out, "expected timm, torch or onnx", formats=())
    refused(subject, out, "num_images of at least 1", num_images=0)
    refused(subject, tmp_path / "none", "none in", images=(str(tmp_path / "no.jpg"),))
    with pytest.raises(ValueError, match="a folder of this machine"):
        export_checkpoint(Options(checkpoint="c", out="s3://bucket/out"))
    match = r"expected ema\.safetensors"
    refused(subject, out, match, weights="ema", formats=("timm",))

    def find(name: str) -> None:
        return None

    monkeypatch.setattr(importlib.util, "find_spec", find)
    refused(subject, out, r"pip install 'sovit\[export\]'")


def write(out: Path, **files: str) -> None:
    with whole_folder(out) as folder:
        for name, text in files.items():
            (folder / name).write_text(text)
        mark(folder, content={})


def test_an_export_is_replaced_as_a_whole(tmp_path: Path) -> None:
    out = tmp_path / "a" / "out"
    write(out, one="1", two="2")
    write(out, three="3")
    assert sorted(path.name for path in out.iterdir()) == [MARK, "three"]
    assert [path.name for path in out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("change", ["added", "edited", "unmarked"])
def test_what_is_not_ours_is_not_overwritten(tmp_path: Path, change: str) -> None:
    out = tmp_path / "out"
    write(out, one="1")
    if change == "unmarked":
        (out / MARK).unlink()
    else:
        (out / ("mine" if change == "added" else "one")).write_text("of mine")
    before = {path.name: path.read_text() for path in out.iterdir()}
    name = "mine" if change == "added" else "one"
    with pytest.raises(ValueError, match=rf"got one with {name}, which it did not"):
        write(out, one="2")
    assert {path.name: path.read_text() for path in out.iterdir()} == before
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(ValueError, match="a file; name another"):
        write(file)


def test_what_fails_leaves_nothing_and_the_earlier_one_whole(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(out, one="1")

    def fail(error: Exception) -> None:
        with whole_folder(out) as folder:
            (folder / "one").write_text("2")
            raise error

    with pytest.raises(ValueError, match="as the test wants it"):
        fail(ValueError("as the test wants it"))
    with pytest.raises(ValueError, match=r"that can be written, got .*No space left"):
        fail(OSError(28, "No space left on device"))
    assert (out / "one").read_text() == "1"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(ValueError, match="folder that can be written, got"):
        write(file / "below")
