"""Records of runs: names are taken once, and what has finished stays finished."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pyarrow.fs as pafs
import pytest

from pipelines.checkpoints.run_record import (
    Record,
    new_record,
    read_record,
    write_record,
)
from pipelines.config import Run
from tests.small_runs import small_run


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return dataclasses.replace(small_run("none"), storage=str(tmp_path / "runs"))


def test_a_record_comes_back_with_what_was_written_last(run: Run) -> None:
    record = new_record(run, name="a")
    assert record == Record(name="a", run=run, id=record.id)
    assert record == read_record(run.storage, name="a")
    later = dataclasses.replace(record, mlflow_run_id="abc")
    write_record(later)
    assert read_record(run.storage, name="a") == later
    assert [path.name for path in Path(run.storage, "a").iterdir()] == ["run.json"]


def test_a_taken_name_is_refused(run: Run) -> None:
    new_record(run, name="a")
    with pytest.raises(ValueError, match=r"'a'.* another --name or .* --resume a"):
        new_record(run, name="a")
    new_record(run, name="b")


@pytest.mark.parametrize("name", ["", "a/b", "..", "-a", "a b"])
def test_a_name_that_is_no_folder_is_refused(run: Run, name: str) -> None:
    with pytest.raises(ValueError, match="another --name"):
        new_record(run, name=name)
    assert not Path(run.storage).exists()


def test_a_run_that_is_not_there_is_refused(run: Run) -> None:
    with pytest.raises(ValueError, match=r"'a'.*does not hold.*--storage"):
        read_record(run.storage, name="a")


def test_a_finished_run_is_not_resumed(run: Run) -> None:
    record = new_record(run, name="a")
    write_record(dataclasses.replace(record, status="finished"))
    with pytest.raises(ValueError, match=r"has finished; .* --optim\.num-epochs"):
        read_record(run.storage, name="a")


@pytest.mark.parametrize("content", ["", "{", "[]", '{"name": "a"}', "cut"])
def test_a_damaged_record_is_named(run: Run, content: str) -> None:
    new_record(run, name="a")
    path = Path(run.storage, "a", "run.json")
    path.write_text(path.read_text()[:-9] if content == "cut" else content)
    with pytest.raises(ValueError, match="start a new run") as caught:
        read_record(run.storage, name="a")
    assert str(path) in str(caught.value)


def test_records_live_at_an_address_too(run: Run, tmp_path: Path) -> None:
    remote = dataclasses.replace(run, storage=f"file://{tmp_path}/bucket")
    record = new_record(remote, name="a")
    assert read_record(remote.storage, name="a") == record
    info = pafs.LocalFileSystem().get_file_info(f"{tmp_path}/bucket/a/run.json")
    assert info.is_file
