"""Write and read a model folder in the format of timm and the Hugging Face hub.

`model.safetensors` has the weights, `config.json` what `timm.create_model` needs to
build the network around them and to prepare its images, `README.md` what a person
needs: a network of `sovit` is in timm's registry only where `sovit` is imported.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from pipelines.checkpoints.manifest import read_weights
from pipelines.config import Data, Model
from pipelines.config.serialization import tuples
from pipelines.export.names import readable_names
from pipelines.export.subject import Subject
from pipelines.training.model import (
    architecture_of,
    build_model,
    is_ours,
    without_weights,
)
from pipelines.training.optimizer import classifiers
from sovit.weights.weight_files import find_weights, read_tensors

logger = logging.getLogger(__name__)
WEIGHTS, CONFIG, README = "model.safetensors", "config.json", "README.md"
# What timm's save_for_hf writes unless it is told to write safetensors.
_TORCH_WEIGHTS = "pytorch_model.bin"
_INTERPOLATIONS = ("bilinear", "bicubic")


def write_timm(folder: Path, subject: Subject) -> None:
    """Write a model's weights and configuration into a folder."""
    weights = {name: w.contiguous() for name, w in subject.model.state_dict().items()}
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    config = folder / CONFIG
    config.write_text(json.dumps(_config(subject), indent=2) + "\n")
    (folder / README).write_text(_readme(subject))
    # safetensors lets its owner alone read a file; this one is there to be passed on.
    (folder / WEIGHTS).chmod(config.stat().st_mode)


def load_with_timm(folder: Path, *, wanted: nn.Module) -> nn.Module:
    """Load a written folder with timm alone, in evaluation mode.

    Raises ValueError where a tensor is not the same, bit for bit.
    """
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    own, found = wanted.state_dict(), model.state_dict()
    different = sorted(own.keys() ^ found.keys()) or [
        name for name, value in own.items() if not _is_same(value, found[name])
    ]
    if different:
        raise ValueError(
            f"{WEIGHTS}: expected timm to load every tensor as it is, got another "
            f"{different[0]} and {len(different) - 1} more; nothing was written"
        )
    return model


def needs_sovit(subject: Subject) -> bool:
    """Check whether timm can build the network only with `sovit` imported."""
    return is_ours(architecture_of(subject.settings)[0])


def read_timm(folder: Path) -> Subject:
    """Read a folder that `write_timm` wrote, or timm's own `save_for_hf`.

    Raises ValueError where a file is missing, damaged, or is not for such a network.
    """
    path = folder / CONFIG
    try:
        raw = json.loads(path.read_text())
        settings, data, classes = _read_config(raw)
        descriptions = _descriptions(raw, classes=classes)
    except (OSError, LookupError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path}: expected a model's configuration as sovit-export and timm's "
            f"save_for_hf write it, got one that can't be used ({error!r}); write it "
            "again"
        ) from error
    try:
        model = build_model(settings, num_classes=len(classes))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    file, weights = _read_weights(folder)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(
            f"{file}: expected the weights of {settings.name} as {CONFIG} describes "
            f"it, got others ({str(error)[:200]}); export it again"
        ) from error
    return Subject(
        model=model.eval(),
        settings=settings,
        data=data,
        classes=classes,
        origin={},
        descriptions=descriptions,
    )


def _read_weights(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """Load the weights from whichever file there is, without running code in it."""
    if (folder / WEIGHTS).is_file():
        return folder / WEIGHTS, read_weights(folder / WEIGHTS)
    file = folder / _TORCH_WEIGHTS
    if file.is_file():
        return file, find_weights(read_tensors(file))
    raise ValueError(
        f"expected {WEIGHTS} in {folder}, or {_TORCH_WEIGHTS}, got none; export it "
        "again"
    )


def _config(subject: Subject) -> dict[str, Any]:
    num_classes = len(subject.classes)
    names = readable_names(subject.classes)
    # Stochastic depth is a matter of training: no argument here.
    architecture, model_args = architecture_of(subject.settings)
    needs = {"needs": _hint(architecture)} if needs_sovit(subject) else {}
    return {
        "architecture": architecture,
        "num_classes": num_classes,
        "num_features": getattr(subject.model, "num_features", None),
        "label_names": list(subject.classes),
        **({"label_descriptions": names} if names else {}),
        "pretrained_cfg": _pretrained_cfg(subject),
        "model_args": model_args,
        # timm reads over what it does not know.
        "sovit": {
            **needs,
            "eval_mirror": subject.data.eval_mirror,
            "exif": subject.data.exif,
            **subject.origin,
        },
    }


def _pretrained_cfg(subject: Subject) -> dict[str, Any]:
    model, data, size = subject.model, subject.data, subject.img_size
    usual: dict[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    return {
        "num_classes": len(subject.classes),
        "input_size": [3, size, size],
        "fixed_input_size": bool(usual.get("fixed_input_size", False)),
        "crop_pct": data.crop_pct,
        "crop_mode": "center",
        "interpolation": data.eval_interpolation,
        "mean": list(data.mean),
        "std": list(data.std),
        "first_conv": usual.get("first_conv"),
        "classifier": _classifier_names(model),
        # What else the name's own configuration says is of other weights.
        "label_offset": 0,
        "custom_load": False,
        "pool_size": None,
        "test_input_size": None,
        "test_crop_pct": None,
    }


def _classifier_names(model: nn.Module) -> str | list[str]:
    layers = {id(layer) for layer in classifiers(model)}
    names = [name for name, module in model.named_modules() if id(module) in layers]
    return names[0] if len(names) == 1 else names


def _hint(architecture: str) -> str:
    return (
        f"`import sovit` before timm.create_model: timm alone says Unknown model "
        f"({architecture})"
    )


def _readme(subject: Subject) -> str:
    """Write a model card for people and the hub."""
    architecture, _ = architecture_of(subject.settings)
    needs, first, tag = "", "import timm", ""
    if needs_sovit(subject):
        needs = (
            f"**Needs the package `sovit`** beside timm: {_hint(architecture)}. "
            "Without it there is no way to build this network. Install the package "
            "from the repository that exported this folder (`pip install .`).\n\n"
        )
        first, tag = (
            "import sovit, timm  # sovit puts its networks into timm",
            "- sovit",
        )
    size = subject.img_size
    return f"""---
library_name: timm
tags:
- image-classification
- timm
{tag}
---
# {architecture}

{len(subject.classes):,} classes, images of {size}x{size} pixels.

{needs}```python
{first}

model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
```
"""


def _read_config(raw: dict[str, Any]) -> tuple[Model, Data, tuple[str, ...]]:
    # Older timm wrote the inner part alone.
    config, args = raw.get("pretrained_cfg", raw), dict(raw.get("model_args") or {})
    num_chans, height, width = config["input_size"]
    if num_chans != 3 or height != width:
        raise ValueError(f"input_size {config['input_size']} is not 3 x a square")
    args.pop("num_classes", None)
    num_classes = int(raw.get("num_classes") or config["num_classes"])
    settings = Model(name=raw["architecture"], img_size=height, kwargs=tuples(args))
    ours = raw.get("sovit", {})
    data = Data(
        train="",
        val="",
        batch_size=1,
        crop_pct=config["crop_pct"],
        eval_interpolation=_one_of(_INTERPOLATIONS, config, "interpolation"),
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        eval_mirror=bool(ours.get("eval_mirror", False)),
        exif="rotate" if ours.get("exif") == "rotate" else "ignore",
    )
    _one_of(("center",), {"crop_mode": "center", **config}, "crop_mode")
    # Who wrote it does not choose what else is read here.
    return without_weights(settings), data, _labels(raw, config, num=num_classes)


def _one_of(known: tuple[str, ...], config: dict[str, Any], name: str) -> Any:
    if config[name] not in known:
        raise ValueError(f"{name} {config[name]!r}, and images are prepared by {known}")
    return config[name]


def _labels(
    raw: dict[str, Any], config: dict[str, Any], *, num: int
) -> tuple[str, ...]:
    """Return the class names in the order of the logits, or else numbers."""
    labels = raw.get("label_names") or config.get("label_names")
    if labels is None:
        logger.info("%s names no classes: they are numbered from 0", CONFIG)
        labels = range(num)
    if isinstance(labels, dict):  # by number, with gaps
        labels = [labels.get(str(number), number) for number in range(num)]
    if len(labels) != num or not num:
        raise ValueError(f"{len(labels)} label_names for {num} classes")
    return tuple(str(label) for label in labels)


def _descriptions(raw: dict[str, Any], *, classes: tuple[str, ...]) -> dict[str, str]:
    """Return the classes' readable names; empty unless each has one."""
    config = raw.get("pretrained_cfg", raw)
    found = raw.get("label_descriptions") or config.get("label_descriptions") or {}
    known = {label: str(found[label]) for label in classes if label in found}
    return known if len(known) == len(classes) else {}


def _is_same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)
