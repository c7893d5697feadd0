"""Checkpoints are written beside training, which outlives those that fail."""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipelines.checkpoints import store as stores
from pipelines.checkpoints.snapshot import MODEL_FILE, Snapshot, take_snapshot
from pipelines.checkpoints.store import CheckpointStore, CheckpointWriter
from pipelines.data.batch import Position
from pipelines.events.channel import (
    CheckpointFailed,
    CheckpointSaved,
    Event,
    Message,
    Metrics,
)
from pipelines.storage.path import StoragePath
from tests.small_checkpoints import RUN, snapshot_of


class Store(CheckpointStore):
    """Be a store that waits, or is full at some steps, as it is told."""

    def __init__(self, folder: Path) -> None:
        super().__init__(StoragePath(str(folder)), num_to_keep=2)
        self.begun, self.may_write = threading.Event(), threading.Event()
        self.may_write.set()
        self.full_at: set[int] = set()

    def write(self, snapshot: Snapshot, *, name: str) -> None:
        """Write once it may."""
        self.begun.set()
        self.may_write.wait()
        if snapshot.position.step in self.full_at:
            reason = "No space left on device: s3://key:hidden@bucket/a\nat all"
            raise OSError(errno.ENOSPC, reason)
        super().write(snapshot, name=name)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path)
    yield store
    store.may_write.set()


@pytest.fixture
def told() -> list[Event]:
    return []


@pytest.fixture
def writing(
    store: Store, told: list[Event], monkeypatch: pytest.MonkeyPatch
) -> CheckpointWriter:
    monkeypatch.setattr(stores, "_PATIENCE_S", 0.01)
    return CheckpointWriter(store, tell=told.append, max_failures=1)


def written(writing: CheckpointWriter, *steps: int) -> None:
    for step in steps:
        name = f"step_{step:08d}"
        assert writing.write(lambda s=step: snapshot_of(s), name=name, can_wait=True)


def test_training_goes_on_while_a_store_is_slow(
    store: Store, writing: CheckpointWriter, told: list[Event], tmp_path: Path
) -> None:
    """What is kept are the weights of the moment, whatever training does to them."""
    store.may_write.clear()
    model = torch.nn.Linear(2, 2)
    before = model.weight.detach().clone()

    def take() -> Snapshot:
        return take_snapshot(
            run=RUN,
            position=Position(step=4),
            classes=(),
            metrics={},
            model=model,
            ema=None,
            optimizer=None,
        )

    assert writing.write(take, name="step_00000004")
    assert store.begun.wait(60)
    with torch.no_grad():
        model.weight += 1
    # Within an epoch one is left out rather than waited for, and no copy is made.
    for step in (8, 12):
        name = f"step_{step:08d}"
        assert not writing.write(lambda: pytest.fail("copied"), name=name)
    assert [type(item) for item in told] == [Message, Message]
    assert "step_00000008 is left out" in str(told[0])
    threading.Timer(0.05, store.may_write.set).start()
    written(writing, 16)
    writing.close(is_done=True)
    assert [kept.name for kept in store.kept()] == ["step_00000004", "step_00000016"]
    kept = load_file(tmp_path / "step_00000004" / MODEL_FILE)["weight"]
    assert torch.equal(kept, before)


def test_what_is_written_is_told_and_old_ones_go(
    store: Store, writing: CheckpointWriter, told: list[Event]
) -> None:
    written(writing, 1, 2, 3)
    writing.close(is_done=True)
    assert [item for item in told if isinstance(item, CheckpointSaved)] == [
        CheckpointSaved(name=f"step_{step:08d}", epoch=step, step=step)
        for step in (1, 2, 3)
    ]
    measured = [item for item in told if isinstance(item, Metrics)]
    assert [item.step for item in measured] == [1, 2, 3]
    assert all(item.metrics["train/checkpoint_write_s"] > 0 for item in measured)
    assert [kept.step for kept in store.kept()] == [2, 3]


def test_one_that_fails_is_told_and_the_next_begins_to_count_anew(
    store: Store, writing: CheckpointWriter, told: list[Event]
) -> None:
    store.full_at = {1, 3, 5}
    written(writing, 1, 2, 3, 4, 5, 6)
    writing.close(is_done=True)
    assert [kept.step for kept in store.kept()] == [4, 6]
    reason = "OSError: [Errno 28] No space left on device: s3://bucket/a"
    assert [item for item in told if isinstance(item, CheckpointFailed)] == [
        CheckpointFailed(name=f"step_{step:08d}", reason=reason) for step in (1, 3, 5)
    ]


def test_too_many_in_a_row_end_the_run(store: Store, writing: CheckpointWriter) -> None:
    store.full_at = {2, 3}
    written(writing, 1, 2, 3)
    said = r"got OSError: .*No space.*, for the 2\. time in a row; .* with --resume"
    with pytest.raises(ValueError, match=said) as caught:
        written(writing, 4)
    assert "\n" not in str(caught.value)
    # The run has its error: closing is no second one.
    writing.close(is_done=False)
    assert store.newest() == "step_00000001"


def test_the_last_one_must_be_there(store: Store, writing: CheckpointWriter) -> None:
    written(writing, 1)
    writing.close(is_done=True)
    again = CheckpointWriter(store, tell=lambda item: None, max_failures=9)
    store.full_at = {2}
    written(again, 2)
    with pytest.raises(ValueError, match=r"for the 1\. time"):
        again.close(is_done=True)
    assert store.newest() == "step_00000001"


def test_old_ones_that_can_not_be_deleted_are_no_failure(
    store: Store,
    writing: CheckpointWriter,
    told: list[Event],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*, until: int) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(store, "retire", refuse)
    written(writing, 1, 2, 3)
    writing.close(is_done=True)
    assert [kept.step for kept in store.kept()] == [1, 2, 3]
    reason = "PermissionError: [Errno 13] Permission denied"
    notes = [item.line for item in told if isinstance(item, Message)]
    assert notes == [f"old checkpoints are not deleted: {reason}"] * 3
