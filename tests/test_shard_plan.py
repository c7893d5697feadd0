"""A shard set's folder: stopped work goes on, and nothing else is ever touched."""

from __future__ import annotations

import dataclasses
import io
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines.shards.command import Arguments, make_shards
from pipelines.shards.making import Executor, Summary, Task, in_process
from pipelines.shards.planning import Done

NUM_IMAGES = 30


def jpeg(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (24, 16), (value, 90, 160)).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    root = tmp_path / "source"
    for i in range(NUM_IMAGES):
        folder = root / f"class{i % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i:02d}.jpg").write_bytes(jpeg(i))
    return root


def make(
    source: Path, out: Path, *, execute: Executor = in_process, **options
) -> Summary:
    return make_shards(Arguments(source=source, out=out, **options), execute=execute)


def files(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir()}


def keys(out: Path) -> list[str]:
    tables = [pq.read_table(path) for path in sorted(out.glob("*.parquet"))]
    return pa.concat_tables(tables)["key"].to_pylist()


class Stopped(Exception):
    """Stands for the end of the process."""


def stop_after(num: int) -> Executor:
    def execute(task: Task, indices: Sequence[int]) -> Iterator[Done]:
        for place, index in enumerate(indices):
            if place == num:
                raise Stopped
            yield task(index)

    return execute


@pytest.mark.parametrize("num", [0, 1, 3])
def test_stopped_work_goes_on(source: Path, tmp_path: Path, num: int) -> None:
    make(source, tmp_path / "whole" / "train", num_shards=4)
    out = tmp_path / "train"
    with pytest.raises(Stopped):
        make(source, out, execute=stop_after(num), num_shards=4)
    kept = {path: path.stat().st_mtime_ns for path in out.glob("*.parquet")}
    assert len(kept) == num
    # What a killed process leaves: a shard half written, a shard cut by the disk.
    (out / "train-00003-of-00004.parquet.0.partial").write_bytes(b"PAR1")
    (out / "train-00003-of-00004.parquet").write_bytes(b"PAR1 cut")
    summary = make(source, out, num_shards=4)
    assert not summary.was_finished
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert files(out) == files(tmp_path / "whole" / "train")


def test_a_lost_shard_is_made_again(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "train"
    make(source, out, num_shards=4)
    whole = files(out)
    (out / "train-00002-of-00004.parquet").unlink()
    assert not make(source, out, num_shards=4).was_finished
    assert files(out) == whole


def test_a_finished_set_is_left_alone(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "train"
    first = make(source, out, num_shards=4)
    times = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    again = make(source, out, num_shards=4)
    assert again == dataclasses.replace(first, was_finished=True)
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == times


def test_other_arguments_are_refused_until_overwritten(
    source: Path, tmp_path: Path
) -> None:
    out = tmp_path / "train"
    make(source, out, num_shards=4)
    with pytest.raises(ValueError, match=r"seed was 0, is 1\. .*--overwrite"):
        make(source, out, num_shards=4, seed=1)
    with pytest.raises(ValueError, match="num_shards was 4, is 3"):
        make(source, out, num_shards=3)
    (source / "class0" / "new.jpg").write_bytes(jpeg(99))
    with pytest.raises(ValueError, match="num_images was 30, is 31"):
        make(source, out, num_shards=4)
    (source / "class0" / "new.jpg").unlink()
    make(source, out, num_shards=3, overwrite=True)
    assert len(keys(out)) == len(set(keys(out))) == NUM_IMAGES
    assert len(list(out.glob("*.parquet"))) == 3


def test_foreign_folders_are_never_touched(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "train"
    out.mkdir()
    (out / "thesis.txt").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="not a set that this command began"):
            make(source, out, overwrite=overwrite)
    assert files(out) == {"thesis.txt": b"precious"}
    with pytest.raises(
        ValueError, match=r"folder to write to, got .*, a file; name another"
    ):
        make(source, out / "thesis.txt")


KILLED = """
import sys, time
from pathlib import Path
from pipelines.shards.command import Arguments, make_shards
from pipelines.shards.making import in_process

def slowly(task, indices):
    for done in in_process(task, indices):
        print("shard", flush=True)
        time.sleep(0.05)
        yield done

source, out = map(Path, sys.argv[1:])
make_shards(Arguments(source=source, out=out, num_shards=8), execute=slowly)
"""


def test_killed_work_goes_on(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "train"
    command = [sys.executable, "-c", KILLED, str(source), str(out)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[1]
    )
    assert process.stdout is not None
    for _ in range(3):
        assert process.stdout.readline() == b"shard\n"
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.stdout.close()
    assert 3 <= len(list(out.glob("*.parquet"))) < 8
    assert not (out / "report.json").exists()
    make(source, out, num_shards=8)
    assert len(keys(out)) == len(set(keys(out))) == NUM_IMAGES
    make(source, tmp_path / "whole" / "train", num_shards=8)
    assert files(out) == files(tmp_path / "whole" / "train")
