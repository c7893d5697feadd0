"""Runs in a bucket: their records and their checkpoints."""

from __future__ import annotations

import dataclasses
import json
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.checkpoints.manifest import opened, read_manifest
from pipelines.checkpoints.run_record import (
    check_name,
    new_record,
    read_record,
    write_record,
)
from pipelines.checkpoints.snapshot import save_checkpoint
from pipelines.config import Run
from pipelines.data.batch import Position
from pipelines.storage.path import StoragePath
from pipelines.training.model import build_model
from tests.bucket_sets import ROOT, content, upload
from tests.s3_server import BUCKET, Line, s3_server
from tests.small_runs import small_run


@pytest.fixture
def line() -> Iterator[Line]:
    with s3_server() as line:
        yield line


def test_a_record_comes_back_from_a_bucket(line: Line) -> None:
    run = dataclasses.replace(small_run("none"), storage=f"{ROOT}/runs")
    record = new_record(run, name="a")
    assert read_record(run.storage, name="a") == record
    later = dataclasses.replace(record, mlflow_run_id="abc")
    line.taken()
    write_record(later)
    # One request, so that no reader meets half a record or none.
    assert line.taken() == [f"PUT /{BUCKET}/runs/a/run.json"]
    assert read_record(run.storage, name="a") == later
    assert list(content(StoragePath(run.storage, "a"))) == ["run.json"]
    with pytest.raises(ValueError, match=r"'a'.* another --name or .* --resume a"):
        check_name(run.storage, name="a")
    check_name(run.storage, name="b")
    with pytest.raises(ValueError, match=r"'b'.*does not hold.*--storage"):
        read_record(run.storage, name="b")


def write_checkpoint(folder: Path, run: Run) -> Path:
    folder.mkdir()
    save_checkpoint(
        folder,
        run=run,
        position=Position(epoch=1),
        classes=("a", "b", "c"),
        metrics={},
        model=build_model(run.model, num_classes=3),
        ema=None,
        optimizer=None,
    )
    return folder


def test_a_checkpoint_is_copied_from_a_bucket(line: Line, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "epoch_0001", small_run("none"))
    (folder / "notes.txt").write_text("not of it")
    address = upload(folder, f"{ROOT}/runs/a/epoch_0001")
    with opened(address) as copy:
        assert read_manifest(copy) == read_manifest(folder)
        names = {path.name for path in copy.iterdir()}
        assert names == {"checkpoint.json", "model.safetensors"}
    assert not copy.exists()
    for local in (str(folder), f"file://{folder}"):
        with opened(local) as same:
            assert same == folder
    assert folder.exists()


@pytest.mark.parametrize("damage", ["cut", "changed", "gone"])
def test_a_damaged_checkpoint_in_a_bucket_is_named(
    line: Line, tmp_path: Path, damage: str
) -> None:
    folder = write_checkpoint(tmp_path / "epoch_0001", small_run("none"))
    address = upload(folder, f"{ROOT}/epoch_0001")
    weights = StoragePath(address).within("model.safetensors")
    whole = weights.read()
    if damage == "gone":
        weights.delete()
    else:
        weights.write(whole[:-1] if damage == "cut" else whole[:-1] + b"\0\0")
    with (
        pytest.raises(ValueError, match=f"{weights}: .*the one before it"),
        opened(address),
    ):
        pass
    manifest = StoragePath(address).within("checkpoint.json")
    manifest.write(manifest.read()[:-9])
    with pytest.raises(ValueError, match=f"{manifest}: .*cut off"), opened(address):
        pass
    with (
        pytest.raises(ValueError, match="expected a checkpoint with"),
        opened(f"{ROOT}/nothing"),
    ):
        pass


def test_a_checkpoint_names_no_file_outside_its_folder(
    line: Line, tmp_path: Path
) -> None:
    folder = write_checkpoint(tmp_path / "epoch_0001", small_run("none"))
    raw = json.loads((folder / "checkpoint.json").read_text())
    raw["files"]["../escaped"] = {"num_bytes": 1, "crc32": 0}
    del raw["crc32"]
    raw["crc32"] = zlib.crc32(json.dumps(raw, sort_keys=True).encode())
    (folder / "checkpoint.json").write_text(json.dumps(raw))
    address = upload(folder, f"{ROOT}/epoch_0001")
    with pytest.raises(ValueError, match="do not trust"), opened(address):
        pass
