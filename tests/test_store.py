"""A run's checkpoints: whole or absent, and the last and the best of them kept."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file

from pipelines.checkpoints import store
from pipelines.checkpoints.snapshot import (
    EMA_FILE,
    MANIFEST,
    MODEL_FILE,
    OPTIMIZER_FILE,
)
from pipelines.checkpoints.store import CheckpointStore, write_validation
from pipelines.storage import filesystem, retry
from pipelines.storage.path import StoragePath
from tests.s3_server import BUCKET, Line, s3_server
from tests.small_checkpoints import snapshot_of, write_and_be_killed

FILES = (MODEL_FILE, EMA_FILE, OPTIMIZER_FILE, MANIFEST)


def names_of(of: CheckpointStore) -> list[str]:
    return [kept.name for kept in of.kept()]


def write_epochs(of: CheckpointStore, *top1s: float | None) -> None:
    for step, top1 in enumerate(top1s, start=1):
        of.write(snapshot_of(step, top1=top1), name=f"epoch_{step:04d}")
        of.retire(until=step)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def here(folder: Path) -> CheckpointStore:
    return CheckpointStore(StoragePath(str(folder)), num_to_keep=2)


@pytest.fixture
def line(monkeypatch: pytest.MonkeyPatch) -> Iterator[Line]:
    monkeypatch.setattr(retry, "_WAITS_S", (0.001,) * 4)
    monkeypatch.setattr(filesystem, "_CLIENT_TRIES", 1)
    with s3_server() as line:
        yield line


def test_of_a_run_that_has_none_there_is_none(here: CheckpointStore) -> None:
    assert here.kept() == []
    assert here.newest() == ""
    assert here.best() is None
    here.clean()
    here.retire(until=9)


def test_the_last_and_the_best_are_kept(here: CheckpointStore, folder: Path) -> None:
    write_epochs(here, 20.0, 40.0, 30.0, 40.0, 10.0, 10.0)
    # Of two that are equally good the first.
    assert names_of(here) == ["epoch_0002", "epoch_0005", "epoch_0006"]
    best = here.best()
    assert best is not None
    assert (best.name, best.metrics["val/top1"]) == ("epoch_0002", 40.0)
    assert here.newest() == "epoch_0006"
    assert sorted(os.listdir(folder)) == names_of(here)
    here.write(snapshot_of(7), name="step_00000007")
    here.write(snapshot_of(8), name="step_00000008")
    here.retire(until=8)
    assert names_of(here) == ["epoch_0002", "step_00000007", "step_00000008"]
    with here.opened("step_00000008") as newest:
        assert load_file(newest / MODEL_FILE)["weight"].tolist() == [8.0] * 3


def test_an_accuracy_that_is_no_number_is_not_the_best(here: CheckpointStore) -> None:
    write_epochs(here, float("nan"), 5.0, None, float("nan"))
    best = here.best()
    assert best is not None
    assert best.name == "epoch_0002"


def test_a_life_that_was_given_up_is_left_alone(here: CheckpointStore) -> None:
    """Those of later steps are no reason to delete what the run now stands on."""
    write_epochs(here, None, None)
    for step in (8, 9):
        here.write(snapshot_of(step), name=f"step_{step:08d}")
    write_epochs(here, None, None, None)
    assert names_of(here) == ["epoch_0002", "epoch_0003", *names_of(here)[2:]]
    assert names_of(here)[2:] == ["step_00000008", "step_00000009"]


def test_what_is_evaluated_later_is_kept_until_then(folder: Path) -> None:
    waiting = CheckpointStore(StoragePath(str(folder)), num_to_keep=1, waits=True)
    write_epochs(waiting, None, None, None)
    assert names_of(waiting) == ["epoch_0001", "epoch_0002", "epoch_0003"]
    for epoch, top1 in ((1, 20.0), (2, 30.0)):
        write_validation(
            waiting.place(f"epoch_{epoch:04d}"), metrics={"val/top1": top1}
        )
    # Within an epoch nothing is evaluated, so nothing is waited for.
    waiting.write(snapshot_of(4), name="step_00000004")
    waiting.write(snapshot_of(5), name="step_00000005")
    waiting.retire(until=5)
    assert names_of(waiting) == ["epoch_0002", "epoch_0003", "step_00000005"]
    assert [kept.is_measured for kept in waiting.kept()] == [True, False, False]
    # A power cut may empty what was just written.
    (folder / "epoch_0002" / store.VALIDATION_FILE).write_text("")
    assert [kept.is_measured for kept in waiting.kept()] == [False, False, False]


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_newest_is_passed_over(
    here: CheckpointStore, folder: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    write_epochs(here, 10.0, 20.0)
    path = folder / "epoch_0002" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert here.newest() == "epoch_0001"
    assert f"{path}: expected" in caplog.text


def test_cut_off_at_any_moment_it_is_whole_or_none(folder: Path) -> None:
    """Real kills, before each file is flushed in turn, until nothing is cut off."""
    # torch takes seconds to import: one process does, and others fork off it.
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["tests.small_runs"])
    here = CheckpointStore(StoragePath(str(folder)), num_to_keep=2)
    here.write(snapshot_of(1), name="epoch_0001")
    found: list[tuple[str, list[str]]] = []
    writer = None
    while writer is None or writer.exitcode == -signal.SIGKILL:
        writer = processes.Process(
            target=write_and_be_killed,
            args=(folder,),
            kwargs={"name": "epoch_0002", "flush": len(found) + 1},
        )
        writer.start()
        writer.join()
        found.append((here.newest(), sorted(os.listdir(folder / "epoch_0002"))))
        here.clean()
        assert (folder / "epoch_0002").exists() == (here.newest() == "epoch_0002")
    assert writer.exitcode == 0
    weights = [MODEL_FILE, EMA_FILE, OPTIMIZER_FILE]
    partial = f"{MANIFEST}.partial"
    assert found == [
        *[("epoch_0001", sorted(weights))] * 3,
        ("epoch_0001", sorted([*weights, partial])),
        # Its own folder's names and the run's may be on the disk or not.
        *[("epoch_0002", sorted([*weights, MANIFEST]))] * 3,
    ]


def test_the_manifest_comes_after_all_else_is_on_the_disk(
    here: CheckpointStore, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here.write(snapshot_of(1), name="epoch_0001")
    calls: list[str] = []
    flush, rename = os.fsync, os.rename

    def flushed(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        calls.append(f"flush {path.relative_to(folder)}")
        flush(descriptor)

    def renamed(source: Path, target: Path) -> None:
        calls.append(f"rename to {Path(target).relative_to(folder)}")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "rename", renamed)
    here.write(snapshot_of(2), name="epoch_0002")
    assert calls == [
        f"flush epoch_0002/{MODEL_FILE}",
        f"flush epoch_0002/{EMA_FILE}",
        f"flush epoch_0002/{OPTIMIZER_FILE}",
        f"flush epoch_0002/{MANIFEST}.partial",
        f"rename to epoch_0002/{MANIFEST}",
        "flush epoch_0002",
        "flush .",
    ]


@pytest.mark.parametrize("name", FILES)
def test_one_that_can_not_be_written_leaves_nothing(
    here: CheckpointStore, folder: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    here.write(snapshot_of(1), name="epoch_0001")
    flush = os.fsync

    def full(descriptor: int) -> None:
        if Path(os.readlink(f"/proc/self/fd/{descriptor}")).name.startswith(name):
            raise OSError(errno.ENOSPC, "No space left on device")
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        here.write(snapshot_of(2), name="epoch_0002")
    assert os.listdir(folder) == ["epoch_0001"]
    assert here.newest() == "epoch_0001"


def test_what_is_half_deleted_is_no_checkpoint(
    here: CheckpointStore, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2, 3):
        here.write(snapshot_of(step), name=f"epoch_{step:04d}")

    def cut(place: StoragePath) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(StoragePath, "delete_folder", cut)
        with pytest.raises(OSError, match="Input/output"):
            here.retire(until=3)
    assert sorted(os.listdir(folder)) == ["epoch_0001", "epoch_0002", "epoch_0003"]
    assert names_of(here) == ["epoch_0002", "epoch_0003"]
    # Of a name that is not ours nothing is touched.
    (folder / "epoch_mine").mkdir()
    here.clean()
    assert sorted(os.listdir(folder)) == ["epoch_0002", "epoch_0003", "epoch_mine"]


def test_in_a_bucket_it_is_the_same(line: Line) -> None:
    there = CheckpointStore(StoragePath(f"s3://{BUCKET}/run"), num_to_keep=1)
    assert there.newest() == ""
    write_epochs(there, 20.0, 10.0, 10.0)
    assert names_of(there) == ["epoch_0001", "epoch_0003"]
    line.taken()
    there.write(snapshot_of(4), name="step_00000004")
    puts = [item.rpartition("/")[2] for item in line.taken() if item.startswith("PUT")]
    assert [name.partition("?")[0] for name in puts][-1] == MANIFEST
    assert there.newest() == "step_00000004"
    with there.opened("step_00000004") as folder:
        assert sorted(os.listdir(folder)) == sorted(FILES)
        assert load_file(folder / EMA_FILE)["weight"].tolist() == [4.0] * 3

    for cut in (MODEL_FILE, MANIFEST):
        line.fail(f"PUT .*step_00000005/{cut}", num=100)
        with pytest.raises(ValueError, match=f"{cut}: expected an answer of the store"):
            there.write(snapshot_of(5), name="step_00000005")
        line.mend()
        assert there.newest() == "step_00000004"
        names = {
            entry.base_name for entry in StoragePath(f"s3://{BUCKET}/run").entries()
        }
        assert "step_00000005" not in names
    # A killed process leaves what it had put so far.
    there.place("step_00000006").within(MODEL_FILE).write(b"some")
    assert there.newest() == "step_00000004"
    there.clean()
    assert there.place("step_00000006").within(MODEL_FILE).kind().name == "NotFound"


def test_a_store_that_does_not_answer_is_not_taken_for_an_empty_one(
    line: Line,
) -> None:
    """Else a run would begin anew for a bucket that was away for a minute."""
    there = CheckpointStore(StoragePath(f"s3://{BUCKET}/run"), num_to_keep=1)
    there.write(snapshot_of(1), name="epoch_0001")
    for pattern in ("list-type", f"GET .*{MANIFEST}"):
        line.fail(pattern, num=100)
        with pytest.raises(ValueError, match="expected an answer of the store"):
            there.newest()
        line.mend()
    damaged = json.dumps({"run": {}}).encode()
    there.place("epoch_0002").within(MANIFEST).write(damaged)
    assert there.newest() == "epoch_0001"
