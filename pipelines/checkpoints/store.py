"""Keep a run's checkpoints in its folder, the last few and the best; write them async.

The state is read from the folder alone, so whoever starts next, a worker after a
failure or a driver on another machine, resumes from the newest whole checkpoint.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

import pyarrow.fs as pafs

from pipelines.checkpoints.manifest import Manifest, opened, peek, read_manifest
from pipelines.checkpoints.snapshot import MANIFEST, Snapshot, write_snapshot
from pipelines.events.channel import (
    CheckpointFailed,
    CheckpointSaved,
    Event,
    Message,
    Metrics,
)
from pipelines.storage.path import StoragePath, flush
from pipelines.storage.redaction import error_summary
from pipelines.storage.retry import answering

logger = logging.getLogger(__name__)

_MEASURED = "val/top1"
"""Metric that every evaluation has."""
VALIDATION_FILE = "validation.json"
_NAME = re.compile(r"(epoch_\d{4,}|step_\d{8,})")
# Timeout for a checkpoint within an epoch to wait for the one before it.
_PATIENCE_S = 0.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointInfo:
    """Facts about a whole checkpoint."""

    name: str
    step: int
    metrics: Mapping[str, float]
    is_measured: bool
    """Whether its epoch has ended and been evaluated."""


class CheckpointStore:
    """Store of one run's checkpoints.

    Args:
        folder: The run's.
        num_to_keep: How many of the last are kept; the best is kept beside them.
        metric: What the best is the best by, such as top1.
        waits: Whether checkpoints of epochs are evaluated later, by another process:
            until then none is deleted.
    """

    def __init__(
        self,
        folder: StoragePath,
        *,
        num_to_keep: int,
        metric: str = "top1",
        waits: bool = False,
    ) -> None:
        self._folder, self._metric = folder, metric
        self._num_to_keep = num_to_keep
        self._waits = waits

    def kept(self) -> list[CheckpointInfo]:
        """List the whole checkpoints, by their steps.

        One with a damaged manifest is skipped with a warning. Raises ValueError
        where the store does not answer: what it holds then is not known.
        """
        found = []
        for name in self._names():
            place = self._folder.within(name)
            try:
                manifest = peek(place)
            except ValueError as error:
                if isinstance(error.__cause__, ConnectionError):
                    raise
                logger.warning("%s", error)
                continue
            if manifest is not None:
                found.append(_kept(place, name=name, manifest=manifest))
        return sorted(found, key=lambda kept: kept.step)

    def newest(self) -> str:
        """Return the name of the newest whole checkpoint; "" where there is none.

        A local one is read: a disk may have lost what it said it had. Of a bucket's,
        each file is there whole or not at all.
        """
        for kept in reversed(self.kept()):
            try:
                if not self._folder.is_remote:
                    read_manifest(Path(self.place(kept.name).open()[1]))
                return kept.name
            except ValueError as error:
                logger.warning("%s", error)
        return ""

    def best(self) -> CheckpointInfo | None:
        """Return the checkpoint with the best metric, the first of several."""
        return self._best(self.kept())

    def _best(self, there: list[CheckpointInfo]) -> CheckpointInfo | None:
        scores = [score_of(kept.metrics, metric=self._metric) for kept in there]
        best = max(scores, default=-math.inf)
        return there[scores.index(best)] if best > -math.inf else None

    def place(self, name: str) -> StoragePath:
        """Return the place of a checkpoint."""
        return self._folder.within(name)

    @contextlib.contextmanager
    def opened(self, name: str) -> Iterator[Path]:
        """Yield a checkpoint's local folder; ValueError if a remote one is damaged."""
        with opened(self.place(name)) as folder:
            yield folder

    def write(self, snapshot: Snapshot, *, name: str) -> None:
        """Write a checkpoint.

        Raises OSError, ValueError or RuntimeError where that fails: then it is not
        there, and all others are as they were.
        """
        place = self.place(name)
        with self._whole(place), answering():
            place.make_folder()
            # One of this name, from an abandoned attempt, is void from now on.
            place.within(MANIFEST).delete()
            place.within(VALIDATION_FILE).delete()
            if self._folder.is_remote:
                self._upload(snapshot, place=place)
            else:
                folder = Path(place.open()[1])
                write_snapshot(folder, snapshot)
                # Else one that is deleted after it could be gone before it is there.
                flush(folder.parent)

    def retire(self, *, until: int) -> None:
        """Delete all but the last, the best and those to be evaluated.

        Args:
            until: Step; later checkpoints are of an abandoned attempt, and left alone.
        """
        there = [kept for kept in self.kept() if kept.step <= until]
        best = self._best(there)
        for kept in there[: -self._num_to_keep]:
            is_due = (
                self._waits and kept.name.startswith("epoch") and (not kept.is_measured)
            )
            if kept != best and not is_due:
                with answering():
                    # Its manifest first: what is half deleted is no checkpoint.
                    self.place(kept.name).within(MANIFEST).delete()
                    self.place(kept.name).delete_folder()

    def clean(self) -> None:
        """Delete what a killed process left half written."""
        for name in self._names():
            with contextlib.suppress(ValueError):
                if peek(self.place(name)) is None:
                    self.place(name).delete_folder()

    @contextlib.contextmanager
    def _whole(self, place: StoragePath) -> Iterator[None]:
        """Delete a folder that could not be written."""
        try:
            yield
        except BaseException:
            with contextlib.suppress(OSError, ValueError):
                place.delete_folder()  # a full disk needs the room
            raise

    def _upload(self, snapshot: Snapshot, *, place: StoragePath) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            write_snapshot(Path(scratch), snapshot)
            # The manifest last: a checkpoint without it was cut off.
            files = sorted(Path(scratch).iterdir(), key=lambda f: f.name == MANIFEST)
            for file in files:
                with place.within(file.name).writing() as partial:
                    shutil.copyfile(file, partial)

    def _names(self) -> list[str]:
        try:
            with answering():
                entries = self._folder.entries()
        except FileNotFoundError:  # a bucket has no folder before its first file
            return []
        return [
            entry.base_name
            for entry in entries
            if entry.type == pafs.FileType.Directory
            and _NAME.fullmatch(entry.base_name)
        ]


def score_of(metrics: Mapping[str, float], *, metric: str) -> float:
    """Return a held-out metric so that more is better.

    Minus infinity where it was not measured.
    """
    value = metrics.get(f"val/{metric}", math.nan)
    if math.isnan(value):
        return -math.inf
    return -value if metric == "loss" else value


def write_validation(place: StoragePath, *, metrics: Mapping[str, float]) -> None:
    """Save in a checkpoint's folder the metrics that another process measured."""
    with answering():
        place.within(VALIDATION_FILE).write(json.dumps(dict(metrics)).encode())


def _kept(place: StoragePath, *, name: str, manifest: Manifest) -> CheckpointInfo:
    metrics, is_measured = dict(manifest.metrics), _MEASURED in manifest.metrics
    if not is_measured:
        # After a power cut it may be empty: then it is evaluated again.
        gone = (FileNotFoundError, json.JSONDecodeError)
        with contextlib.suppress(*gone), answering():
            metrics |= json.loads(place.within(VALIDATION_FILE).read())
            is_measured = True
    step = manifest.position.step
    return CheckpointInfo(
        name=name, step=step, metrics=metrics, is_measured=is_measured
    )


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
