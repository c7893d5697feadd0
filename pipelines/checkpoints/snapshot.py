"""Copy a checkpoint's contents, and write them later, whole or not at all.

Taking a snapshot is all that training waits for; writing it is for a thread.
"""

from __future__ import annotations

import dataclasses
import json
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from pipelines.config import Run
from pipelines.config.serialization import to_json
from pipelines.data.batch import Position
from pipelines.hardware.device import download, wait_for_stream
from pipelines.storage.path import flush
from pipelines.storage.redaction import without_credentials
from pipelines.training.state import whole

MANIFEST = "checkpoint.json"
MODEL_FILE = "model.safetensors"
EMA_FILE = "ema.safetensors"
OPTIMIZER_FILE = "optimizer.pt"
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """Copy of a checkpoint's contents on the host; training may go on meanwhile."""

    run: Run
    position: Position
    classes: tuple[str, ...]
    metrics: Mapping[str, float]
    model: Mapping[str, Tensor]
    ema: Mapping[str, Tensor] | None
    optimizer: Mapping[str, Any] | None


def take_snapshot(
    *,
    run: Run,
    position: Position,
    classes: tuple[str, ...],
    metrics: Mapping[str, float],
    model: nn.Module,
    ema: nn.Module | None,
    optimizer: torch.optim.Optimizer | None,
) -> Snapshot:
    """Copy weights, average and optimiser state to the host.

    A collective where the model is sharded: other workers call `assist_snapshot`.
    """
    snapshot = Snapshot(
        run=run,
        position=position,
        classes=classes,
        metrics=dict(metrics),
        model=copied(model.state_dict()),
        ema=None if ema is None else copied(ema.state_dict()),
        optimizer=None if optimizer is None else copied(optimizer.state_dict()),
    )
    wait_for_stream(next(model.parameters()).device)  # once, for all of the copies
    return snapshot


def assist_snapshot(
    *,
    model: nn.Module,
    ema: nn.Module | None,
    optimizer: torch.optim.Optimizer | None,
) -> None:
    """Join the collectives of another worker's `take_snapshot`.

    Each tensor is released once it is whole: nothing comes to this worker's host.
    """
    for part in (model, ema, optimizer):
        if part is not None:
            copied(part.state_dict(), copy=_let_go)


def copied(value: Any, *, copy: Callable[[Tensor], Any] = download) -> Any:
    """Copy tensors, within dicts and lists, to the host; see `download`."""
    if isinstance(value, Tensor):
        return copy(whole(value.detach()))
    if isinstance(value, Mapping):
        return {name: copied(part, copy=copy) for name, part in value.items()}
    if isinstance(value, list):
        return [copied(part, copy=copy) for part in value]
    return value


def _let_go(tensor: Tensor) -> None:
    """Discard a tensor."""


def write_snapshot(folder: Path, snapshot: Snapshot) -> None:
    """Write a checkpoint, without credentials, into a folder; its manifest last.

    After a power cut the folder holds a whole checkpoint or no manifest: every file is
    on the disk before the manifest is there.
    """
    (folder / MANIFEST).unlink(missing_ok=True)
    names = [MODEL_FILE]
    save_file(_contiguous(snapshot.model), folder / MODEL_FILE)
    if snapshot.ema is not None:
        save_file(_contiguous(snapshot.ema), folder / EMA_FILE)
        names.append(EMA_FILE)
    if snapshot.optimizer is not None:
        torch.save(snapshot.optimizer, folder / OPTIMIZER_FILE)
        names.append(OPTIMIZER_FILE)
    for name in names:
        flush(folder / name)
    content = {
        "run": json.loads(without_credentials(to_json(snapshot.run))),
        "position": dataclasses.asdict(snapshot.position),
        "classes": list(snapshot.classes),
        "metrics": dict(snapshot.metrics),
        "files": {name: fingerprint(folder / name) for name in names},
    }
    content["crc32"] = crc_of(content)
    partial = folder / f"{MANIFEST}.partial"
    partial.write_text(json.dumps(content, indent=2))
    flush(partial)
    partial.rename(folder / MANIFEST)
    flush(folder)


def save_checkpoint(
    folder: Path,
    *,
    run: Run,
    position: Position,
    classes: tuple[str, ...],
    metrics: Mapping[str, float],
    model: nn.Module,
    ema: nn.Module | None,
    optimizer: torch.optim.Optimizer | None,
) -> None:
    """Take a snapshot and write it: see `write_snapshot`."""
    snapshot = take_snapshot(
        run=run,
        position=position,
        classes=classes,
        metrics=metrics,
        model=model,
        ema=ema,
        optimizer=optimizer,
    )
    write_snapshot(folder, snapshot)


def crc_of(content: Mapping[str, Any]) -> int:
    """Compute the CRC-32 of a manifest's content."""
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def fingerprint(path: Path) -> dict[str, int]:
    """Compute a file's size in bytes and its CRC-32."""
    crc = 0
    with path.open("rb") as file:
        while block := file.read(_CHUNK_BYTES):
            crc = zlib.crc32(block, crc)
    return {"num_bytes": path.stat().st_size, "crc32": crc}


def _contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.contiguous() for name, tensor in tensors.items()}
