"""Doors for foreign bytes: no checkpoint, whoever wrote it, gets code to run.

Each test puts a pickle that would make a file where we read; docs/security.md lists
them. That no module unpickles at all is in test_security_code.py; shards and tars are
in test_security_shards.py, secrets in test_security_secrets.py, a cluster's doors in
test_cluster.py.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import pickle
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

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
from pipelines.checkpoints.pretrained import load_initial
from pipelines.checkpoints.run_record import find_record
from pipelines.checkpoints.snapshot import (
    EMA_FILE,
    MANIFEST,
    MODEL_FILE,
    OPTIMIZER_FILE,
    save_checkpoint,
)
from pipelines.config import Model
from pipelines.data.batch import Position
from pipelines.data.shard_set import read_shard_set
from pipelines.evaluate import Options, evaluate_checkpoint
from pipelines.training.model import build_model
from tests.small_runs import SO_VIT, plain, small_run, state_of
from tests.small_sets import write_set
from tuning.heads.backbone import load_backbone
from tuning.heads.feature_set import TOKENS_FILE, TokenSet
from tuning.trials.ledger import read_sweep

RUN = small_run("none", model=SO_VIT, ema_decay=0.9)
CLASSES = ("a", "b", "c")


@dataclass(frozen=True)
class Hostile:
    """Make a file when it is unpickled."""

    marker: Path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.marker}",)


@dataclass(frozen=True)
class Trap:
    """Give hostile bytes, and tell whether they have come to run."""

    marker: Path

    @property
    def hostile(self) -> Hostile:
        return Hostile(self.marker)

    @property
    def pickled(self) -> bytes:
        # The protocol that torch writes.
        return pickle.dumps({"state_dict": self.hostile}, protocol=2)

    @property
    def was_sprung(self) -> bool:
        return self.marker.exists()


@pytest.fixture
def trap(tmp_path: Path) -> Iterator[Trap]:
    made = Trap(tmp_path / "unpickled")
    yield made
    assert not made.was_sprung


def test_the_trap_works(tmp_path: Path) -> None:
    made = Trap(tmp_path / "unpickled")
    pickle.loads(made.pickled)
    assert made.was_sprung


def as_zip(trap: Trap) -> bytes:
    out = io.BytesIO()
    torch.save({"state_dict": trap.hostile, "state": {}, "param_groups": []}, out)
    return out.getvalue()


def as_old_torch(trap: Trap) -> bytes:
    out = io.BytesIO()
    content = {"state_dict": trap.hostile}
    torch.save(content, out, _use_new_zipfile_serialization=False)
    return out.getvalue()


def as_tar(trap: Trap) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name in ("sys_info", "pickle", "tensors", "storages"):
            info = tarfile.TarInfo(name)
            info.size = len(trap.pickled)
            tar.addfile(info, io.BytesIO(trap.pickled))
    return out.getvalue()


def as_plain(trap: Trap) -> bytes:
    return trap.pickled


FORMS = [as_zip, as_old_torch, as_tar, as_plain]
Form = Callable[[Trap], bytes]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Write a checkpoint of ours."""
    state = state_of(RUN)
    assert state.ema is not None
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    save_checkpoint(
        folder,
        run=RUN,
        position=Position(),
        classes=CLASSES,
        metrics={},
        model=state.model,
        ema=state.ema.module,
        optimizer=state.optimizer,
    )
    return folder


def forge(folder: Path, changes: dict[str, Any]) -> None:
    """Change a manifest so that all its sums are right: a forger can count too."""
    raw = json.loads((folder / MANIFEST).read_text()) | changes
    for name in raw["files"]:
        content = (folder / name).read_bytes()
        raw["files"][name] = {"num_bytes": len(content), "crc32": zlib.crc32(content)}
    del raw["crc32"]
    raw["crc32"] = zlib.crc32(json.dumps(raw, sort_keys=True).encode())
    (folder / MANIFEST).write_text(json.dumps(raw))


def load_as_mlflow(folder: Path) -> None:
    from pipelines.tracking.model import ImageClassifier

    context = SimpleNamespace(artifacts={"checkpoint": str(folder)})
    ImageClassifier().load_context(cast(Any, context))


READERS: dict[str, Callable[[Path], object]] = {
    "load_model": load_model,
    "sovit-eval": lambda folder: evaluate_checkpoint(
        Options(checkpoint=str(folder), shards="none")
    ),
    "model.init_from": lambda folder: load_initial(
        build_model(SO_VIT, num_classes=3), str(folder), classes=CLASSES
    ),
    "a backbone": lambda folder: load_backbone(
        RUN, checkpoint=str(folder), num_classes=3
    ),
    "a resumed worker": lambda folder: load_weights(
        build_model(SO_VIT, num_classes=3), folder, ema=True
    ),
    "the MLflow model": load_as_mlflow,
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("reader", READERS)
def test_weights_that_are_a_pickle_are_refused(
    reader: str, form: Form, folder: Path, trap: Trap
) -> None:
    for name in (MODEL_FILE, EMA_FILE):
        (folder / name).write_bytes(form(trap))
    forge(folder, {})
    assert read_manifest(folder).classes == CLASSES, "forged well"
    with pytest.raises(ValueError, match=f"{EMA_FILE}: expected safetensors") as caught:
        READERS[reader](folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("form", FORMS)
def test_an_optimizer_of_other_objects_is_refused(
    form: Form, folder: Path, trap: Trap
) -> None:
    (folder / OPTIMIZER_FILE).write_bytes(form(trap))
    forge(folder, {})
    with pytest.raises(ValueError, match=f"{OPTIMIZER_FILE}: expected an optimiser's"):
        load_optimizer(state_of(RUN).optimizer, folder)


@pytest.mark.parametrize("form", FORMS)
def test_an_official_file_of_other_objects_is_refused(
    form: Form, tmp_path: Path, trap: Trap
) -> None:
    path = tmp_path / "So_ViT_7.pth.tar"
    path.write_bytes(form(trap))
    model = timm.create_model("so_vit_7", depth=2)
    before = plain(model)
    refused = (ValueError, RuntimeError, pickle.UnpicklingError)
    with pytest.raises(refused):
        sovit.load_official(model, path)
    with pytest.raises(refused):
        load_backbone(RUN, checkpoint=str(path), num_classes=3)
    assert all(torch.equal(before[name], now) for name, now in plain(model).items())


@pytest.mark.parametrize("form", FORMS)
def test_weights_that_timm_loads_are_weights_alone(
    form: Form, tmp_path: Path, trap: Trap
) -> None:
    path = tmp_path / "weights.pth"
    path.write_bytes(form(trap))
    ways: list[dict[str, Any]] = [
        {"checkpoint_path": str(path)},
        {"pretrained": True, "pretrained_cfg_overlay": {"file": str(path)}},
    ]
    for kwargs in ways:
        with pytest.raises(RuntimeError, match="weights_only"):
            build_model(Model(name="test_vit", kwargs=kwargs), num_classes=3)


def test_a_checkpoint_does_not_choose_what_else_is_read(
    folder: Path, tmp_path: Path, trap: Trap
) -> None:
    path = tmp_path / "weights.pth"
    path.write_bytes(as_zip(trap))
    kwargs = {**SO_VIT.kwargs, "checkpoint_path": str(path), "pretrained": True}
    model = dataclasses.replace(SO_VIT, kwargs=kwargs, init_from=str(path))
    run = dataclasses.replace(RUN, model=model)
    forge(folder, {"run": json.loads(json.dumps(dataclasses.asdict(run)))})
    loaded, manifest = load_model(folder)
    assert manifest.run.model.kwargs["checkpoint_path"] == str(path), "forged well"
    weights = plain(loaded)
    wanted = build_model(SO_VIT, num_classes=3)
    load_weights(wanted, folder, ema=True)
    assert all(torch.equal(weights[name], was) for name, was in plain(wanted).items())


@pytest.mark.parametrize(
    "name", ["hf-hub:someone/model", "local-dir:/some/model", "hf_hub:someone/model"]
)
def test_a_checkpoint_names_no_model_that_is_elsewhere(name: str, folder: Path) -> None:
    model = dataclasses.replace(SO_VIT, name=name)
    run = dataclasses.replace(RUN, model=model)
    forge(folder, {"run": json.loads(json.dumps(dataclasses.asdict(run)))})
    with pytest.raises(ValueError, match=r"model\.name: expected a model that timm"):
        load_model(folder)


@pytest.mark.parametrize("name", ["/etc/passwd", "../secret", "a/../../secret"])
def test_a_checkpoint_names_no_file_that_is_elsewhere(name: str, folder: Path) -> None:
    raw = json.loads((folder / MANIFEST).read_text())
    del raw["crc32"]
    raw["files"][name] = {"num_bytes": 1, "crc32": 1}
    raw["crc32"] = zlib.crc32(json.dumps(raw, sort_keys=True).encode())
    (folder / MANIFEST).write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=f"plain names of files, got '{name}'"):
        read_manifest(folder)


JSON_READERS: dict[str, Callable[[Path], object]] = {
    MANIFEST: read_manifest,
    "run.json": lambda folder: find_record(str(folder.parent), name=folder.name),
    "sweep.json": lambda folder: read_sweep(str(folder.parent), name=folder.name),
    TOKENS_FILE: lambda folder: TokenSet.open(str(folder)),
    "classes.json": lambda folder: read_shard_set(str(folder)),
}


@pytest.mark.parametrize("name", JSON_READERS)
def test_descriptions_are_json_and_nothing_else(
    name: str, tmp_path: Path, trap: Trap
) -> None:
    folder = tmp_path / "set"
    write_set(folder, groups=[[4]])
    # As text: nothing stops it before the JSON reader does.
    (folder / name).write_bytes(pickle.dumps(trap.hostile, protocol=0))
    with pytest.raises(ValueError, match=name):
        JSON_READERS[name](folder)
