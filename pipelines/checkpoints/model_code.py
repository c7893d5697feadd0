"""Load the user's own code that a checkpoint's model needs, where it is trusted.

A run's record holds its recipe file. Who trains with it trusts it: its digest is noted
in the user's own state folder, and for such code nothing more is asked. What comes from
elsewhere is run only where the user names its file.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

import timm

from pipelines.checkpoints.run_record import find_record
from pipelines.checkpoints.weight_sources import find_manifest
from pipelines.config.own_code import OwnCode, read_code
from pipelines.config.recipes import load_code
from pipelines.storage.filesystem import parent_address
from pipelines.storage.path import StoragePath
from pipelines.storage.redaction import error_summary

logger = logging.getLogger(__name__)
_NOTES = "sovit/trusted_code"


def load_model_code(checkpoint: str, *, given: str = "") -> OwnCode | None:
    """Register a checkpoint's model with timm, where it is one of the user's own.

    Args:
        given: Recipe file that the user names; it is run whatever the record says.

    Raises ValueError where the file fails, and where the record holds code that the
    user never trained with.
    """
    if given:
        code = read_code(Path(given))
        load_code(code)
        return code
    manifest = find_manifest(StoragePath(checkpoint))
    if manifest is None or timm.is_model(manifest.run.model.name):
        return None
    folder = parent_address(checkpoint)
    name = StoragePath(folder).name
    record = find_record(parent_address(folder), name=name)
    if record is None or record.code is None:
        return None
    if not is_trusted(record.code):
        raise ValueError(
            f"expected a checkpoint of a model that timm knows, got "
            f"{manifest.run.model.name!r} of {record.code.file}, code that was not "
            "trained with by this user on this machine and is not run by itself; read "
            f"it in {StoragePath(folder).within('run.json')}, "
            "and name its file: --code FILE"
        )
    load_code(record.code)
    return record.code


def trust(code: OwnCode) -> None:
    """Record that the user trains with this code; an unwritable home records nothing.

    Then `sovit-eval` asks for `--code`.
    """
    if is_trusted(code):
        return
    file = _notes()
    try:
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with file.open("a") as notes:
            notes.write(f"{code.digest}\n")
    except OSError as error:
        logger.warning(
            "%s is not noted as yours in %s (%s): sovit-eval, sovit-predict and "
            "sovit-export will ask for --code",
            code.file,
            file,
            error_summary(error),
        )


def is_trusted(code: OwnCode) -> bool:
    """Check whether the user has trained with this very code."""
    try:
        return code.digest in _notes().read_text().split()
    except OSError:
        return False


def _notes() -> Path:
    home = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    return Path(home, _NOTES)
