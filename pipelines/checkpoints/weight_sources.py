"""Read the weights to start training from: ours, or a file that others wrote.

An address may name a checkpoint folder of ours, a folder as timm and Hugging Face write
it (`config.json` beside the weights), or one file of weights: `.safetensors`, or what
`torch.save` wrote, of which only tensors and plain values are read.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from pipelines.checkpoints.manifest import (
    WEIGHT_SUFFIXES,
    Manifest,
    find_manifest,
    is_weight_file,
)
from pipelines.checkpoints.snapshot import EMA_FILE, MANIFEST, MODEL_FILE, fingerprint
from pipelines.storage.path import StoragePath
from pipelines.storage.retry import answering
from sovit.weights.weight_files import average_keys, find_weights, read_tensors

_CONFIG = "config.json"
_IN_FOLDERS = ("model.safetensors", "pytorch_model.bin")


@dataclass(frozen=True, kw_only=True)
class Start:
    """Weights by name, and their origin."""

    weights: dict[str, Tensor]
    is_average: bool
    classes: tuple[str, ...] | None
    """Classes of the classifier, in its order; None where nothing says them."""


def read_start(address: str) -> Start:
    """Read the weights at an address, the moving average where there is one.

    Of a bucket one file of weights is fetched, and what says which. Raises ValueError,
    without credentials, where there is none, it is damaged or holds anything else, or
    the store does not answer.
    """
    place = StoragePath(address)
    try:
        with answering():
            manifest = find_manifest(place)
            if manifest is not None:
                return _of_checkpoint(place, manifest=manifest)
            return _of_file(place) if is_weight_file(place) else _of_folder(place)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise ValueError(
            f"model.init_from: expected a checkpoint folder with {MANIFEST}, a folder "
            f"with {_CONFIG} and {_IN_FOLDERS[0]}, or a file that ends in "
            f"{', '.join(WEIGHT_SUFFIXES)}, got {str(place)!r}; name one that is there"
        ) from error
    except PermissionError as error:
        raise ValueError(
            f"model.init_from: expected weights that can be read, got {str(place)!r} "
            f"({error.strerror}); see what is allowed there"
        ) from error


def _of_checkpoint(place: StoragePath, *, manifest: Manifest) -> Start:
    name = EMA_FILE if EMA_FILE in manifest.files else MODEL_FILE
    file, wanted, got = place.within(name), manifest.files[name], None
    with contextlib.suppress(FileNotFoundError), _at_hand(file) as path:
        got = fingerprint(path)
        if got == wanted:
            return Start(
                weights=dict(read_tensors(path, shown=str(file))),
                is_average=name == EMA_FILE,
                classes=manifest.classes,
            )
    raise ValueError(
        f"{file}: expected {wanted}, got {got}; this checkpoint is damaged, use the "
        "one before it"
    )


def _of_folder(place: StoragePath) -> Start:
    """Read what timm's `save_for_hf` and `push_to_hf_hub` write."""
    config = place.within(_CONFIG)
    try:
        described = json.loads(config.read())
        named = {**described.get("pretrained_cfg", {}), **described}.get("label_names")
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(
            f"{config}: expected a model's description in JSON, got something else; "
            "name the file of weights beside it"
        ) from error
    is_list = isinstance(named, list) and all(isinstance(name, str) for name in named)
    classes = tuple(named) if is_list and named else None
    for name in _IN_FOLDERS[:-1]:
        with contextlib.suppress(FileNotFoundError):
            return _of_file(place.within(name), classes=classes)
    return _of_file(place.within(_IN_FOLDERS[-1]), classes=classes)


def _of_file(place: StoragePath, *, classes: tuple[str, ...] | None = None) -> Start:
    with _at_hand(place) as path:
        found = read_tensors(path, shown=str(place))
    is_average = bool(average_keys(found))
    try:
        weights = find_weights(found, ema=is_average)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error
    return Start(weights=weights, is_average=is_average, classes=classes)


@contextlib.contextmanager
def _at_hand(place: StoragePath) -> Iterator[Path]:
    """Yield a local file: a remote one is copied, and removed after use."""
    if not place.is_remote:
        yield Path(place.open()[1])
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, place.name)
        place.download(path)
        yield path
