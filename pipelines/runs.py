"""Keep a run's folder: its configuration, its MLflow run, and whether it has ended."""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass
from typing import Literal

import pyarrow.fs as pafs

from pipelines.config import Run
from pipelines.credentials import error_summary
from pipelines.files import Place
from pipelines.retries import answering
from pipelines.runfile import from_json, to_json

_RECORD = "run.json"
_NAME = re.compile(r"\w[\w.-]*")


@dataclass(frozen=True, kw_only=True)
class Record:
    """Say what a run is and how far it came."""

    name: str
    run: Run
    mlflow_run_id: str = ""
    status: Literal["running", "finished"] = "running"


def check_name(storage: str, *, name: str) -> None:
    """Raise ValueError where a new run's name is taken or can't name a folder.

    The same where the storage is a bucket that is not there, or does not answer.
    """
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"wanted a run's name of letters, digits, '.', '_' and '-', came {name!r}; "
            "choose another --name"
        )
    root = Place(storage)
    with answering():
        if root.within(name).kind() != pafs.FileType.NotFound:
            raise ValueError(
                f"wanted a new name for this run, came {name!r}, which {str(root)!r} "
                f"already holds; choose another --name or go on with --resume {name}"
            )
        root.check_bucket()


def new_record(run: Run, *, name: str) -> Record:
    """Make a new run's folder; ValueError as `check_name`."""
    check_name(run.storage, name=name)
    record = Record(name=name, run=run)
    place = Place(run.storage).within(name)
    try:
        with answering():
            place.make_folder()
        write_record(record)
    except OSError as error:
        raise ValueError(
            f"storage: wanted a place that can be written, came {str(place)!r} "
            f"({error_summary(error)}); set --storage"
        ) from error
    return record


def read_record(storage: str, *, name: str) -> Record:
    """Read a run that is to go on; ValueError where it is not there or has finished."""
    record = find_record(storage, name=name)
    if record is None:
        raise ValueError(
            f"wanted a run to resume, came {name!r}, which {str(Place(storage))!r} "
            "does not hold; look there for the names, or set --storage"
        )
    if record.status == "finished":
        raise ValueError(
            f"wanted a run that has not ended, came {name!r}, which has finished; "
            "start a new one with more --optim.num-epochs"
        )
    return record


def find_record(storage: str, *, name: str) -> Record | None:
    """Read a run's record, None where there is none; ValueError where it is damaged."""
    file = Place(storage).within(name).within(_RECORD)
    try:
        with answering():
            text = file.read()
    except OSError:
        return None
    try:
        raw = json.loads(text)
        return Record(
            name=raw["name"],
            run=from_json(json.dumps(raw["run"])),
            mlflow_run_id=raw["mlflow_run_id"],
            status=raw["status"],
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file}: wanted a run's record, came one that can't be read "
            f"({error!r}); start a new run"
        ) from error


def write_record(record: Record) -> None:
    """Write a run's record in place of the one before, whole or not at all."""
    content = dataclasses.asdict(record) | {"run": json.loads(to_json(record.run))}
    file = Place(record.run.storage).within(record.name).within(_RECORD)
    with answering():
        file.write(json.dumps(content, indent=2).encode())
