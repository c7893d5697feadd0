"""Whole runs on devices that are too small for their micro-batches."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.models import _registry

from pipelines.checkpoints.run_record import read_record
from pipelines.checkpoints.snapshot import MODEL_FILE
from pipelines.config import Model, Run
from pipelines.config.own_code import read_code
from pipelines.config.recipes import load_recipe
from pipelines.config.serialization import to_json
from pipelines.driver.fit import fit
from pipelines.errors import RunFailedError
from pipelines.worker.checkpointing import MEMORY_FILE
from tests.demo_runs import small_demo
from tests.mlflow_stores import prepare_store
from tests.test_alone import Reports

# ROOM is the number of images that the device has memory for.
OWN = """
import torch
from torch import nn
from timm.models import register_model
from pipelines.config import Run
from pipelines.config.serialization import from_json

class Tiny(nn.Module):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.body = nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), nn.ReLU())
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(8, num_classes)

    def get_classifier(self): return self.head

    def forward(self, images):
        with open(NOTES, "a") as notes:
            notes.write(f"{int(self.training)} {len(images)}\\n")
        if len(images) > ROOM:
            raise torch.OutOfMemoryError("out of memory, as the test wants it")
        return self.head(self.drop(self.body(images).mean((2, 3))))

@register_model
def my_large_net(pretrained=False, **kwargs): return Tiny(kwargs["num_classes"])

def mine() -> Run:
    return from_json(RUN)
"""


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    """Make a run of a model of one's own, of two epochs of ten steps."""
    run = small_demo(tmp_path, num_epochs=2, num_workers=0)
    prepare_store(run.storage)
    yield dataclasses.replace(
        run, model=Model(name="my_large_net", img_size=32), checkpoint_every_steps=4
    )
    _registry._model_entrypoints.pop("my_large_net", None)


def given(run: Run, folder: Path, *, room: int) -> tuple[Run, Path, Path]:
    """Write the run's file; return the run as read from it, the file, and its notes."""
    notes, file = folder / f"notes-{room}", folder / f"mine_{room}.py"
    known = f"\nROOM, NOTES, RUN = {room}, {str(notes)!r}, {to_json(run)!r}\n"
    file.write_text(OWN + known)
    return load_recipe(f"{file}:mine"), file, notes


def rows(notes: Path, *, training: int) -> list[int]:
    lines = [line.split() for line in notes.read_text().splitlines()]
    return [int(num) for kind, num in lines if int(kind) == training]


def weights_of(run: Run, name: str) -> dict[str, torch.Tensor]:
    return load_file(Path(run.storage, name, "epoch_0002", MODEL_FILE))


def test_a_run_finds_what_fits_says_so_once_and_goes_on_with_it(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    optim = dataclasses.replace(run.optim, num_accumulation=2)
    told, file, _ = given(dataclasses.replace(run, optim=optim), tmp_path, room=99)
    fit(told, name="told", keep_model=False, code=read_code(file))
    assert timm.is_model("my_large_net")

    capsys.readouterr()
    found, file, notes = given(run, tmp_path, room=16)
    at_epochs_end = Reports(last=3, end=RuntimeError)
    with pytest.raises(RunFailedError):
        fit(
            found,
            name="found",
            keep_model=False,
            code=read_code(file),
            callbacks=[at_epochs_end],
        )
    said = capsys.readouterr().out
    line = "training ran out of memory with 32 images at a time: 2 x 16 from here"
    assert said.count(f"{line} (the batch stays 32)") == 1
    assert said.count("evaluation ran out of memory with 32 images at a time") == 1
    memory = Path(run.storage, "found", MEMORY_FILE)
    assert json.loads(memory.read_text()) == {"max_rows": 16}
    assert rows(notes, training=1) == [32] + 20 * [16]

    notes.unlink()
    record = read_record(run.storage, name="found")
    fit(found, name="found", record=record, keep_model=False, code=read_code(file))
    assert line not in capsys.readouterr().out
    assert set(rows(notes, training=1)) == {16}
    other = weights_of(run, "told")
    for name, value in weights_of(run, "found").items():
        assert torch.equal(value, other[name]), name
