"""Sweep folder: the sweep's record and the state of each trial.

    STORAGE/NAME/sweep.json         the sweep, written once
    STORAGE/NAME/full/0007.json     a trial, written whenever something happens to it
    STORAGE/NAME/head/0007.json     a trial of the head alone, if any

Only the driver writes here; a resumed sweep reads it all again.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow.fs as pafs

from pipelines.config import Run
from pipelines.config.own_code import OwnCode
from pipelines.config.serialization import from_json, to_json, tuples
from pipelines.storage.path import StoragePath
from pipelines.storage.retry import answering
from tuning.trials.options import Search
from tuning.trials.trial import last_report, trial_name

Status = Literal[
    "waiting", "running", "finished", "stopped", "failed", "diverged", "refused"
]
StageName = Literal["head", "full"]
BAD: tuple[Status, ...] = ("failed", "diverged", "refused")
ENDED: tuple[Status, ...] = ("finished", "stopped", *BAD)
_FILE = "sweep.json"


@dataclass(frozen=True, kw_only=True)
class TrialRecord:
    """Setting of one trial, and its progress and outcome so far."""

    number: int
    setting: Mapping[str, Any]
    """Values of the searched fields, by dotted names."""
    status: Status = "waiting"
    """stopped: by the scheduler, before its last epoch. diverged: its loss became NaN
    or infinite. refused: its settings, or something else only the user can fix.
    failed: its workers died more often than the run and the sweep allow."""
    reports: tuple[Mapping[str, float], ...] = ()
    """What each epoch reported, including `epoch`."""
    seconds: float = 0.0
    """Wall time of all attempts."""
    num_attempts: int = 0
    reason: str = ""
    """Why it failed, diverged or was refused."""
    mlflow_run_id: str = ""

    @property
    def has_ended(self) -> bool:
        """Whether the trial has ended, well or badly."""
        return self.status in ENDED

    @property
    def epoch(self) -> int:
        """Last epoch reported, 0 before the first."""
        return round(self.reports[-1]["epoch"]) if self.reports else 0

    def told_again(self, *, metrics: Sequence[str]) -> list[Mapping[str, Any]]:
        """Return the trial's reports to replay, including a bad end."""
        if self.status not in ("diverged", "refused"):
            return list(self.reports)
        end = last_report(self.status, self.reason, metrics=metrics)
        return [*self.reports, end]

    def last(self, metric: str) -> float | None:
        """Return a metric's value in the last report, if any."""
        return self.reports[-1].get(metric) if self.reports else None


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What a sweep searches, from which run, and how."""

    name: str
    recipe: str
    """What the base run was made of, as the command named it."""
    run: Run
    """The run that every trial changes."""
    space: str
    """The space as the command named it."""
    domains: Mapping[str, str]
    """Searched fields, each with its domain in words."""
    search: Search
    code: OwnCode | None = None
    """The recipe's file, where that is the user's own."""
    mlflow_run_id: str = ""
    id: str = ""
    """Random, as a run's: of its trials too, since names are used again. Sweeps of
    earlier versions have none."""

    @property
    def folder(self) -> StoragePath:
        """Folder of the sweep."""
        return StoragePath(self.run.storage).within(self.name)

    def trial_name(self, number: int, *, stage: StageName = "full") -> str:
        """Return the name of a trial's run; a head's exists only in MLflow."""
        return trial_name(self.name, number, kind="head-" if stage == "head" else "")


def write_sweep(sweep: Sweep) -> None:
    """Write a sweep's record."""
    content = dataclasses.asdict(sweep) | {"run": json.loads(to_json(sweep.run))}
    with answering():
        sweep.folder.make_folder()
        sweep.folder.within(_FILE).write(_bytes(content))


def read_sweep(storage: str, *, name: str) -> Sweep:
    """Read a sweep to resume; ValueError where there is none."""
    file = StoragePath(storage).within(name).within(_FILE)
    try:
        with answering():
            text = file.read()
    except OSError as error:
        raise ValueError(
            f"expected a sweep to go on with, got {name!r}, of which "
            f"{str(StoragePath(storage))!r} holds no {_FILE}; look there for the "
            "names, or set --storage"
        ) from error
    try:
        raw = tuples(json.loads(text))
        run = from_json(json.dumps(raw.pop("run")))
        code = raw.pop("code", None)
        return Sweep(
            run=run,
            search=Search(**raw.pop("search")),
            code=OwnCode(**code) if code else None,
            **raw,
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{file}: expected a sweep as this version writes it, got one that can't "
            f"be read ({error!r}); read it with the version that wrote it"
        ) from error


class Ledger:
    """Trials of one stage of a sweep, mirrored in memory and on disk."""

    def __init__(self, sweep: Sweep, *, stage: StageName) -> None:
        self.sweep = sweep
        self.stage: StageName = stage
        self._folder = sweep.folder.within(stage)
        self._entries: dict[int, TrialRecord] = {}
        with answering():
            if self._folder.kind() == pafs.FileType.NotFound:
                return
            names = [info.base_name for info in self._folder.entries()]
        for name in sorted(name for name in names if name.endswith(".json")):
            entry = self._read(name)
            self._entries[entry.number] = entry

    def __getitem__(self, number: int) -> TrialRecord:
        return self._entries[number]

    def __contains__(self, number: object) -> bool:
        return number in self._entries

    @property
    def entries(self) -> tuple[TrialRecord, ...]:
        """All trials, by number."""
        return tuple(self._entries[number] for number in sorted(self._entries))

    def put(self, entry: TrialRecord) -> TrialRecord:
        """Store a trial's record in place of its earlier one."""
        if not self._entries:
            with answering():
                self._folder.make_folder()
        self._entries[entry.number] = entry
        with answering():
            self._file(entry.number).write(_bytes(dataclasses.asdict(entry)))
        return entry

    def change(self, number: int, **changes: Any) -> TrialRecord:
        """Store a trial's record with some fields changed."""
        return self.put(dataclasses.replace(self[number], **changes))

    def _file(self, number: int) -> StoragePath:
        return self._folder.within(f"{number:04d}.json")

    def _read(self, name: str) -> TrialRecord:
        file = self._folder.within(name)
        with answering():
            text = file.read()
        try:
            return TrialRecord(**tuples(json.loads(text)))
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"{file}: expected a trial's record, got one that can't be read "
                f"({error!r}); delete it, and the trial is made again"
            ) from error


def _bytes(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, indent=2).encode()
