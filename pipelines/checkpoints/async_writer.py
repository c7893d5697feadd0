"""Asynchronous checkpoint writer: training goes on, and survives failed writes."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait

from pipelines.checkpoints.snapshot import Snapshot
from pipelines.checkpoints.store import CheckpointStore
from pipelines.events.channel import (
    CheckpointFailed,
    CheckpointSaved,
    Event,
    Message,
    Metrics,
)
from pipelines.storage.redaction import error_summary

# Timeout for a checkpoint within an epoch to wait for the one before it.
_PATIENCE_S = 0.5


class CheckpointWriter:
    """Asynchronous writer of snapshots, one after the other.

    A failed write is reported, and training goes on; earlier checkpoints stay as they
    were. Too many failures in a row, or a failure of the run's last checkpoint, end the
    run.

    Args:
        tell: Sends an event to the driver.
        max_failures: Failures in a row that training survives.
    """

    def __init__(
        self,
        store: CheckpointStore,
        *,
        tell: Callable[[Event], None],
        max_failures: int,
    ) -> None:
        self._store, self._tell = store, tell
        self._max_failures = max_failures
        self._num_failures = 0
        self._error: Exception | None = None
        self._pending: Future[None] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")

    def write(
        self, take: Callable[[], Snapshot], *, name: str, can_wait: bool = False
    ) -> bool:
        """Take a snapshot and start writing it; return whether that was possible.

        Args:
            can_wait: Whether to wait until the one before it is written. Else this is
                skipped where that takes longer than half a second.

        Raises ValueError where too many writes have failed.
        """
        if self._pending is not None:
            wait([self._pending], timeout=None if can_wait else _PATIENCE_S)
            if not self._pending.done():
                line = f"{name} is left out: the checkpoint before is being written"
                self._tell(Message(line=line))
                return False
        self._check(max_failures=self._max_failures)
        self._pending = self._thread.submit(self._write, take(), name=name)
        return True

    def close(self, *, is_done: bool) -> None:
        """Wait for the write in progress.

        Raises ValueError where training `is_done` and its last checkpoint is not there.
        """
        self._thread.shutdown(wait=True)
        if is_done:
            self._check(max_failures=0)

    def _write(self, snapshot: Snapshot, *, name: str) -> None:
        start_s = time.perf_counter()
        step = snapshot.position.step
        try:
            self._store.write(snapshot, name=name)
        # safetensors, torch and pyarrow each raise their own errors for a full disk.
        except Exception as error:
            self._num_failures += 1
            self._error = error
            self._tell(CheckpointFailed(name=name, reason=error_summary(error)))
            return
        self._num_failures, self._error = 0, None
        self._tell(CheckpointSaved(name=name, epoch=snapshot.position.epoch, step=step))
        seconds = time.perf_counter() - start_s
        self._tell(Metrics(step=step, metrics={"train/checkpoint_write_s": seconds}))
        try:
            self._store.retire(until=step)
        except (OSError, ValueError) as error:
            line = f"old checkpoints are not deleted: {error_summary(error)}"
            self._tell(Message(line=line))

    def _check(self, *, max_failures: int) -> None:
        if self._error is None or self._num_failures <= max_failures:
            return
        raise ValueError(
            f"expected to write a checkpoint, got {error_summary(self._error)}, for "
            f"the {self._num_failures}. time in a row; the one before is whole: see to "
            "it and go on with --resume"
        ) from self._error
