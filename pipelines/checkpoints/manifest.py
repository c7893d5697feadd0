"""Read whole checkpoints and reject all others, without unpickling objects.

A checkpoint is a folder: `model.safetensors`, `ema.safetensors` where an average is
kept, `optimizer.pt` (read with `weights_only=True`) and, written last,
`checkpoint.json` with the run, the position, the classes, the metrics, each file's
size and CRC-32, and its own. A folder whose files do not match it is rejected.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pickle
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from pipelines.checkpoints.run_record import find_record
from pipelines.checkpoints.snapshot import (
    EMA_FILE,
    MANIFEST,
    MODEL_FILE,
    OPTIMIZER_FILE,
    crc_of,
    fingerprint,
)
from pipelines.config import Run
from pipelines.config.own_code import OwnCode, read_code
from pipelines.config.recipes import load_code
from pipelines.config.serialization import from_json
from pipelines.data.batch import Position
from pipelines.storage.filesystem import parent_address
from pipelines.storage.path import StoragePath
from pipelines.storage.redaction import error_summary
from pipelines.storage.retry import answering
from pipelines.training.model import build_model, without_weights

WEIGHT_SUFFIXES = (".safetensors", ".pth", ".pt", ".tar", ".bin")
logger = logging.getLogger(__name__)
_NOTES = "sovit/trusted_code"


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Contents of a checkpoint."""

    run: Run
    position: Position
    classes: tuple[str, ...]
    metrics: dict[str, float]
    files: dict[str, dict[str, int]]
    """Size in bytes and CRC-32 of each file."""


def read_manifest(folder: Path) -> Manifest:
    """Read a checkpoint's manifest and check that every file is whole.

    Raises ValueError where the folder is no checkpoint, or one that was cut off.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(
            f"expected a checkpoint folder with {MANIFEST}, got {folder}; name one "
            "that sovit-train printed"
        )
    raw = _parsed(path.read_bytes(), shown=str(path))
    for name, wanted in _files_of(raw, shown=str(path)).items():
        _check_file(folder / name, wanted=wanted, shown=str(folder / name))
    return _manifest(raw)


def _manifest(raw: Mapping[str, Any]) -> Manifest:
    return Manifest(
        run=from_json(json.dumps(raw["run"])),
        position=Position(**raw["position"]),
        classes=tuple(raw["classes"]),
        metrics=raw["metrics"],
        files=raw["files"],
    )


def peek(place: StoragePath) -> Manifest | None:
    """Read a checkpoint's manifest alone; None where it is missing.

    Raises ValueError where its manifest is damaged.
    """
    manifest = place.within(MANIFEST)
    try:
        with answering():
            content = manifest.read()
    except FileNotFoundError:
        return None
    return _manifest(_parsed(content, shown=str(manifest)))


@contextlib.contextmanager
def opened(address: str | StoragePath) -> Iterator[Path]:
    """Yield the local folder of a checkpoint that may lie in a bucket.

    A local folder is yielded as it is. Of a remote one, the manifest and the files
    that it names are copied, each checked by its size and CRC-32, and removed after
    use. Raises ValueError, naming the address, where there is no checkpoint, it is
    damaged, or the store does not answer.
    """
    place = StoragePath(address) if isinstance(address, str) else address
    if not place.is_remote:
        yield Path(place.open()[1])
        return
    with tempfile.TemporaryDirectory() as folder:
        with answering():
            _copy(place, Path(folder))
        yield Path(folder)


def _copy(place: StoragePath, folder: Path) -> None:
    manifest = place.within(MANIFEST)
    try:
        manifest.download(folder / MANIFEST)
    except FileNotFoundError as error:
        raise ValueError(
            f"expected a checkpoint with {MANIFEST}, got {str(place)!r}; name one that "
            "sovit-train printed"
        ) from error
    raw = _parsed((folder / MANIFEST).read_bytes(), shown=str(manifest))
    for name, wanted in _files_of(raw, shown=str(manifest)).items():
        file = place.within(name)
        with contextlib.suppress(FileNotFoundError):
            file.download(folder / name)
        _check_file(folder / name, wanted=wanted, shown=str(file))


def _files_of(raw: Mapping[str, Any], *, shown: str) -> dict[str, dict[str, int]]:
    for name in raw["files"]:
        if Path(name).name != name:
            why = f"expected plain names of files, got {name!r}; do not trust it"
            raise ValueError(f"{shown}: {why}")
    return raw["files"]


def _check_file(path: Path, *, wanted: dict[str, int], shown: str) -> None:
    got = fingerprint(path) if path.is_file() else None
    if got != wanted:
        raise ValueError(
            f"{shown}: expected {wanted}, got {got}; this checkpoint is damaged, use "
            "the one before it"
        )


def _parsed(manifest: bytes, *, shown: str) -> dict[str, Any]:
    try:
        raw = json.loads(manifest)
        whole = raw.pop("crc32") == crc_of(raw)
    except (ValueError, AttributeError, KeyError):
        whole, raw = False, {}
    if not whole:
        raise ValueError(
            f"{shown}: expected a whole manifest, got one that was cut off or changed; "
            "this checkpoint is damaged, use the one before it"
        )
    return raw


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read tensors by name: safetensors has no room for anything else."""
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(
            f"{path}: expected safetensors, got a file of something else ({error}); "
            "use a checkpoint that sovit-train wrote"
        ) from error


def load_weights(model: nn.Module, folder: Path, *, ema: bool = False) -> None:
    """Load a checkpoint's weights, or their moving average, into a model."""
    path = folder / (EMA_FILE if ema else MODEL_FILE)
    if not path.is_file():
        raise ValueError(
            f"expected {path.name} in {folder}, got none; this run kept no moving "
            "average, evaluate the weights themselves (--no-ema)"
        )
    model.load_state_dict(read_weights(path))


def load_optimizer(optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Load a checkpoint's optimiser state; only tensors and plain values are read.

    Raises ValueError where the file is missing or holds any other object.
    """
    path = folder / OPTIMIZER_FILE
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
    except (OSError, pickle.UnpicklingError, RuntimeError) as error:
        raise ValueError(
            f"{path}: expected an optimiser's state of tensors and plain values, got a "
            f"file that can't be read as one ({str(error)[:200]}); use a checkpoint "
            "that sovit-train wrote"
        ) from error
    optimizer.load_state_dict(state)


def load_model(folder: Path, *, ema: bool | None = None) -> tuple[nn.Module, Manifest]:
    """Build a checkpoint's model with its weights, in evaluation mode.

    With `ema=None` the moving average is taken where the checkpoint has one.
    """
    manifest = read_manifest(folder)
    # Who wrote it does not choose what else is read here.
    settings = without_weights(manifest.run.model)
    model = build_model(settings, num_classes=len(manifest.classes))
    use_ema = EMA_FILE in manifest.files if ema is None else ema
    load_weights(model, folder, ema=use_ema)
    return model.eval(), manifest


def find_manifest(place: StoragePath) -> Manifest | None:
    """Read the manifest of a checkpoint of ours; None where weights of others are.

    Raises ValueError where it is damaged, or the store does not answer.
    """
    if not is_weight_file(place):
        with contextlib.suppress(NotADirectoryError):
            return peek(place)
    return None


def is_weight_file(place: StoragePath) -> bool:
    """Check whether an address names one file of weights, by its ending."""
    return place.name.endswith(WEIGHT_SUFFIXES)


# A run's record holds its recipe file. Who trains with it trusts it: its digest is
# noted in the user's own state folder, and for such code nothing more is asked.
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
