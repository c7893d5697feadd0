"""Resume a run by its name, and only with unchanged settings."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path

from pipelines.checkpoints.run_record import (
    Record,
    check_name,
    find_record,
    read_record,
)
from pipelines.checkpoints.store import CheckpointStore
from pipelines.cli.printed import command_line
from pipelines.config import (
    LOCATIONS,
    NOT_LEARNT,
    NOT_LEARNT_GROUPS,
    READING,
    Run,
)
from pipelines.config.own_code import OwnCode, read_code
from pipelines.config.recipes import load_code, load_recipe
from pipelines.config.serialization import flat_params
from pipelines.driver.preflight import CheckedRun, check_run
from pipelines.storage.filesystem import absolute
from pipelines.storage.path import StoragePath
from pipelines.storage.redaction import without_credentials

logger = logging.getLogger(__name__)
_CHECKPOINT = re.compile(r"(epoch|step)_\d{4,}")


def record_to_resume(name: str, *, storage: str, recipe: str) -> Record | None:
    """Find the record of a run to resume; None where its recipe is to start it.

    Raises ValueError where there is none and no recipe, and where it has finished.
    """
    storage = storage or (load_recipe(recipe).storage if recipe else "runs")
    if recipe and find_record(storage, name=name) is None:
        return None
    return read_record(storage, name=name)


def resume_command(run: Run, *, name: str, prog: str = "sovit-train") -> str:
    """Format the command that resumes a run or a sweep, ready to paste."""
    storage = "" if run.storage == os.path.abspath("runs") else run.storage
    return command_line(
        prog, "--resume", name, *(["--storage", storage] if storage else [])
    )


def load_recorded(code: OwnCode) -> None:
    """Run the recipe file that a run began with; log if it has changed since."""
    load_code(code)
    try:
        now = read_code(Path(code.origin))
    except ValueError:
        return  # it lay on another machine, or is gone: the record has it
    if now.digest != code.digest:
        logger.warning(
            "%s has changed since this run began, which goes on with what it was; for "
            "what it is now start a new run",
            code.origin,
        )


def run_and_storage(resume: str, *, storage: str) -> tuple[str, str]:
    """Split a run's folder, which `--resume` may name, into its name and its storage.

    Raises ValueError for a folder elsewhere than in `storage`, and for a checkpoint.
    """
    folder, slash, name = resume.rstrip("/").rpartition("/")
    if not slash:
        return resume, storage
    if storage and absolute(storage) != absolute(folder):
        raise ValueError(
            f"expected a run's name beside --storage {storage}, or its folder alone, "
            f"got --resume {resume}; leave one of the two out"
        )
    if _CHECKPOINT.fullmatch(name):
        run = folder.rpartition("/")[2]
        raise ValueError(
            f"expected a run to resume, got {resume!r}, a checkpoint of {run!r}; give "
            f"--resume {folder}: the run goes on from its newest"
        )
    return name, folder or "/"


def check_one_name(name: str, *, resume: str) -> None:
    """Raise ValueError where a resumed run is given another name."""
    if name not in ("", resume):
        raise ValueError(
            f"expected --name for a new run or --resume for one that is there, got "
            f"--name {name} and --resume {resume}; leave one out"
        )


def check_same(before: Run, now: Run, *, advice: str = "leave them out") -> None:
    """Raise ValueError where a run is resumed with settings that change it.

    The shards' location may change: `check_shards` compares their content.
    """
    was, params = flat_params(before), flat_params(now)
    free = NOT_LEARNT | READING | LOCATIONS
    changed = [
        name
        for name in sorted(params.keys() | was.keys())
        if params.get(name) != was.get(name)
        and name not in free
        and not name.startswith(NOT_LEARNT_GROUPS)
    ]
    if changed:
        raise ValueError(
            f"wanted the settings that the run began with, came others for "
            f"{', '.join(changed)}; {advice}, or start a new run"
        )
    if before.scale.is_local != now.scale.is_local:
        raise ValueError(
            "scale.num_workers: wanted 0 again for a run that began so, and at least "
            f"1 for one that did not, came {now.scale.num_workers} after "
            f"{before.scale.num_workers}; leave it out, or start a new run"
        )


def check_start(run: Run, *, name: str, record: Record | None) -> CheckedRun:
    """Check a run before anything is started, new or resumed from its record.

    Raises ValueError as `check_run`, for a name that is taken, and for other shards
    than the run began with.
    """
    if record is None:
        check_name(run.storage, name=name)
        return check_run(run)
    if record.code:
        load_code(record.code)
    folder = StoragePath(run.storage).within(name)
    store = CheckpointStore(folder, num_to_keep=run.num_checkpoints_to_keep)
    # What another training's weights were may be gone once they are in a checkpoint.
    checked = check_run(run, reads_start=not store.newest())
    check_shards(record, now=run, digests=checked.digests)
    return checked


def check_shards(record: Record, *, now: Run, digests: Mapping[str, str]) -> None:
    """Raise ValueError where a run is resumed with other shards than it began with.

    Without digests, in a record of an earlier version, the shards' location must not
    have changed.
    """
    for field, digest in digests.items():
        was = record.digests.get(field)
        place, before = getattr(now.data, field), getattr(record.run.data, field)
        if digest != was and (was is not None or place != before):
            raise ValueError(
                f"data.{field}: expected the shards that the run began with, got "
                f"others in {without_credentials(place)!r}; put them back, set "
                f"--data.{field} to where they are, or start a new run"
            )
