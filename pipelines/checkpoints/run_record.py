"""Record of a run in its folder: configuration, MLflow run, and status."""

from __future__ import annotations

import dataclasses
import json
import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

import pyarrow.fs as pafs

from pipelines.config import Run
from pipelines.config.own_code import OwnCode
from pipelines.config.serialization import from_json, to_json
from pipelines.storage.filesystem import absolute
from pipelines.storage.lease import OWNER_FILE
from pipelines.storage.path import StoragePath
from pipelines.storage.redaction import error_summary
from pipelines.storage.retry import answering

_RECORD = "run.json"
_NAME = re.compile(r"\w[\w.-]*")


@dataclass(frozen=True, kw_only=True)
class Record:
    """A run's identity and status."""

    name: str
    run: Run
    mlflow_run_id: str = ""
    status: Literal["running", "finished"] = "running"
    id: str = ""
    """Random, and a tag of the run in MLflow: names and folders are used again, this is
    not. Records of earlier versions have none."""
    sweep_id: str = ""
    """Of the sweep that the run is a trial of."""
    digests: Mapping[str, str] = field(default_factory=dict)
    """Of the shard sets that it trains and is evaluated on, wherever they lie."""
    code: OwnCode | None = None
    """The recipe file that it began with, where that is none of ours."""


def check_name(storage: str, *, name: str) -> None:
    """Raise ValueError where a new run's name is taken or can't name a folder.

    The same where the storage is a bucket that is not there, or does not answer.
    """
    if not _NAME.fullmatch(name):
        raise ValueError(
            "expected a run's name of letters, digits, '.', '_' and '-', got "
            f"{name!r}; choose another --name"
        )
    root = StoragePath(storage)
    with answering():
        if _is_taken(root.within(name)):
            raise ValueError(
                f"expected a new name for this run, got {name!r}, which {str(root)!r} "
                f"already holds; choose another --name or go on with --resume {name}"
            )
        root.check_bucket()


def _is_taken(folder: StoragePath) -> bool:
    """Check whether a folder contains anything but the lease of who works on it now."""
    if (kind := folder.kind()) != pafs.FileType.Directory:
        return kind != pafs.FileType.NotFound
    names = {entry.base_name for entry in folder.entries()}
    return names != {OWNER_FILE}


def new_record(
    run: Run,
    *,
    name: str,
    sweep_id: str = "",
    digests: Mapping[str, str] = MappingProxyType({}),
    code: OwnCode | None = None,
) -> Record:
    """Create a new run's folder and record; ValueError as `check_name`."""
    check_name(run.storage, name=name)
    record = Record(
        name=name,
        run=run,
        id=uuid.uuid4().hex,
        sweep_id=sweep_id,
        digests=dict(digests),
        code=code,
    )
    place = StoragePath(run.storage).within(name)
    try:
        with answering():
            place.make_folder()
        write_record(record)
    except OSError as error:
        raise ValueError(
            f"storage: expected a place that can be written, got {str(place)!r} "
            f"({error_summary(error)}); set --storage"
        ) from error
    return record


def read_record(storage: str, *, name: str) -> Record:
    """Read a run to resume; ValueError where it is missing or finished."""
    record = find_record(storage, name=name)
    if record is None:
        raise ValueError(
            f"expected a run to resume, got {name!r}, which "
            f"{str(StoragePath(storage))!r} does not hold; look there for the names, "
            "or set --storage"
        )
    if record.status == "finished":
        raise ValueError(
            f"expected a run that has not ended, got {name!r}, which has finished; "
            "start a new one with more --optim.num-epochs"
        )
    if record.name == name:
        return record
    other = find_record(storage, name=record.name)
    if other is not None and other.id == record.id:
        raise ValueError(
            f"expected a run of its own, got {name!r}, a copy of {record.name!r} that "
            f"lies beside it; go on with --resume {record.name}, or move that one away"
        )
    return dataclasses.replace(record, name=name)  # its folder was renamed


def find_record(storage: str, *, name: str) -> Record | None:
    """Read a run's record, None where there is none; ValueError where it is damaged.

    Its storage is where it was found: folders are moved.
    """
    file = StoragePath(storage).within(name).within(_RECORD)
    try:
        with answering():
            text = file.read()
    except OSError:
        return None
    try:
        raw = json.loads(text)
        run = from_json(json.dumps(raw["run"]))
        return Record(
            name=raw["name"],
            run=dataclasses.replace(run, storage=absolute(storage)),
            mlflow_run_id=raw["mlflow_run_id"],
            status=raw["status"],
            id=raw.get("id", ""),
            sweep_id=raw.get("sweep_id", ""),
            digests=dict(raw.get("digests", {})),
            code=OwnCode(**code) if (code := raw.get("code")) else None,
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{file}: expected a run's record, got one that can't be read ({error!r}); "
            "start a new run"
        ) from error


def write_record(record: Record) -> None:
    """Write a run's record in place of the one before, whole or not at all."""
    content = dataclasses.asdict(record) | {"run": json.loads(to_json(record.run))}
    file = StoragePath(record.run.storage).within(record.name).within(_RECORD)
    with answering():
        file.write(json.dumps(content, indent=2).encode())


def delete_record(record: Record) -> None:
    """Delete a new run's record, before anything else is in its folder."""
    with answering():
        StoragePath(record.run.storage).within(record.name).within(_RECORD).delete()
