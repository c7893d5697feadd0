"""Keep a run's checkpoints in its folder: the last few, and the best.

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
from collections.abc import Iterator, Mapping
from pathlib import Path

import pyarrow.fs as pafs

from pipelines.checkpoints.manifest import Manifest, opened, peek, read_manifest
from pipelines.checkpoints.snapshot import MANIFEST, Snapshot, write_snapshot
from pipelines.storage.path import StoragePath, flush
from pipelines.storage.retry import answering

logger = logging.getLogger(__name__)

_MEASURED = "val/top1"
"""Metric that every evaluation has."""
VALIDATION_FILE = "validation.json"
_NAME = re.compile(r"(epoch_\d{4,}|step_\d{8,})")


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
