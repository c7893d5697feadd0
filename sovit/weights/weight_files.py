"""Read files of weights from others, without running any code in them."""

from __future__ import annotations

import argparse
import errno
import logging
import os
import pickle
import re
import struct
from collections.abc import Mapping
from typing import Any

import torch
from timm.models import clean_state_dict, load_state_dict

from sovit.shapes import Tensor

logger = logging.getLogger(__name__)

EMA_KEYS = ("state_dict_ema", "model_ema")
WEIGHT_KEYS = ("state_dict", "model", *EMA_KEYS)
_MAX_NAMES = 5
_SAFETENSORS = ".safetensors"
# Programs with their weights inside, which sovit-export writes too.
_GRAPHS = (".pt2", ".onnx")
# What torch.load raises for files that are cut off or of something else: tried with
# 12,000 that were damaged at random.
_UNREADABLE = (
    pickle.UnpicklingError,
    struct.error,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)


def read_tensors(
    source: str | os.PathLike[str], *, shown: str = ""
) -> Mapping[str, Any]:
    """Read a file of tensors and plain values; reject anything else in it.

    A file is safetensors by its name, else what `torch.save` wrote. Raises ValueError
    that calls the file `shown`, if given.
    """
    shown = shown or os.fspath(source)
    if shown.endswith(_GRAPHS):
        raise ValueError(
            f"expected a file of weights, got {shown!r}, an exported graph; take the "
            "model.safetensors beside it"
        )
    if os.fspath(source).endswith(_SAFETENSORS):
        return _read_safetensors(source, shown=shown)
    try:
        # The release's training script keeps its arguments beside the weights.
        with torch.serialization.safe_globals([argparse.Namespace]):
            found = torch.load(source, map_location="cpu", weights_only=True)
    except _UNREADABLE as error:
        raise ValueError(
            f"expected a file of tensors, got {shown!r}, which holds something else or "
            f"is damaged ({_reason(error)}); do not trust it, take the file that the "
            "authors published, or have its weights saved alone"
        ) from error
    if not isinstance(found, Mapping):
        raise ValueError(
            f"expected a state dict of tensors, got a {type(found).__name__} in "
            f"{shown!r}; take the file that the authors published"
        )
    return found


def _read_safetensors(
    source: str | os.PathLike[str], *, shown: str
) -> Mapping[str, Any]:
    if not os.path.isfile(source):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), shown)
    try:
        return load_state_dict(os.fspath(source), use_ema=False)
    # The library's own error derives from Exception alone, and the library is timm's.
    except Exception as error:
        raise ValueError(
            f"{shown}: expected safetensors, got a file of something else ({error}); "
            "take it from where it was published"
        ) from error


def _reason(error: Exception) -> str:
    """Explain what else a file holds: PyTorch's message advises to load it anyway."""
    text = " ".join(str(error).split())
    other = re.search(r"Unsupported global: GLOBAL (\S+)", text)
    return f"it holds {other[1]}" if other else f"{type(error).__name__}: {text[:120]}"


def find_weights(found: Mapping[str, Any], *, ema: bool = False) -> dict[str, Tensor]:
    """Find the weights in a file's content, without "module." before their names.

    Raises ValueError where there are none, or with `ema` no averaged ones.
    """
    keys = average_keys(found) if ema else _keys_in(found, WEIGHT_KEYS)
    if ema and not keys:
        raise ValueError(
            f"ema=True: expected weights under one of {EMA_KEYS}, got a checkpoint "
            f"with {list(found)[:_MAX_NAMES]}; give ema=False for the weights it has"
        )
    if keys:
        logger.info("Loading the weights under %r", keys[0])
        found = found[keys[0]]
    if not found or not all(isinstance(value, Tensor) for value in found.values()):
        raise ValueError(
            f"expected a state dict of tensors, got {list(found)[:_MAX_NAMES]}; give "
            f"the weights themselves, or under one of {WEIGHT_KEYS}"
        )
    # Of data parallel training and torch.compile.
    return clean_state_dict({str(name): tensor for name, tensor in found.items()})


def average_keys(found: Mapping[str, Any]) -> list[str]:
    """List the keys under which a file has averaged weights."""
    return _keys_in(found, EMA_KEYS)


def _keys_in(found: Mapping[str, Any], keys: tuple[str, ...]) -> list[str]:
    return [key for key in keys if isinstance(found.get(key), Mapping)]
