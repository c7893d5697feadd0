"""Write a model as timm and the Hugging Face hub keep one, and read such a folder.

`model.safetensors` has the weights, `config.json` what `timm.create_model` needs to
build the network around them and to prepare its images.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from pipelines.checkpoint import build_model, read_weights, without_weights
from pipelines.config import Data, Model
from pipelines.export.names import readable_names
from pipelines.export.subject import Subject
from pipelines.optim import classifiers
from pipelines.runfile import tuples
from sovit import Pooling

WEIGHTS, CONFIG = "model.safetensors", "config.json"


def write_timm(folder: Path, subject: Subject) -> None:
    """Write a model's weights and configuration into a folder."""
    weights = {name: w.contiguous() for name, w in subject.model.state_dict().items()}
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    config = folder / CONFIG
    config.write_text(json.dumps(_config(subject), indent=2) + "\n")
    # safetensors lets its owner alone read a file; this one is there to be passed on.
    (folder / WEIGHTS).chmod(config.stat().st_mode)


def load_with_timm(folder: Path, *, wanted: nn.Module) -> nn.Module:
    """Load what was written with timm alone, in evaluation mode.

    Raises ValueError where a tensor is not the same, bit for bit.
    """
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    own, found = wanted.state_dict(), model.state_dict()
    different = sorted(own.keys() ^ found.keys()) or [
        name for name, value in own.items() if not _is_same(value, found[name])
    ]
    if different:
        raise ValueError(
            f"{WEIGHTS}: wanted timm to load every tensor as it is, came another "
            f"{different[0]} and {len(different) - 1} more; nothing was written"
        )
    return model


def read_timm(folder: Path) -> Subject:
    """Read a folder that `write_timm` wrote, or one of timm's own of the same kind.

    Raises ValueError where a file is missing, damaged, or is not for such a network.
    """
    path = folder / CONFIG
    try:
        settings, data, classes = _read_config(json.loads(path.read_text()))
    except (OSError, LookupError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path}: wanted a model's configuration as sovit-export writes it, came "
            f"one that can't be read ({error!r}); export the checkpoint again"
        ) from error
    model = build_model(settings, num_classes=len(classes))
    if not (folder / WEIGHTS).is_file():
        raise ValueError(f"wanted {WEIGHTS} in {folder}, came none; export it again")
    try:
        model.load_state_dict(read_weights(folder / WEIGHTS))
    except RuntimeError as error:
        raise ValueError(
            f"{folder / WEIGHTS}: wanted the weights of {settings.name} as {CONFIG} "
            f"describes it, came others ({str(error)[:200]}); export it again"
        ) from error
    return Subject(
        model=model.eval(), settings=settings, data=data, classes=classes, origin={}
    )


def _config(subject: Subject) -> dict[str, Any]:
    num_classes = len(subject.classes)
    names = readable_names(subject.classes)
    return {
        "architecture": subject.settings.name,
        "num_classes": num_classes,
        "num_features": getattr(subject.model, "num_features", None),
        "label_names": list(subject.classes),
        **({"label_descriptions": names} if names else {}),
        "pretrained_cfg": _pretrained_cfg(subject),
        "model_args": _model_args(subject),
        # timm reads over what it does not know.
        "sovit": {
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


def _model_args(subject: Subject) -> dict[str, Any]:
    """Give what the network is built with; stochastic depth is a matter of training."""
    settings = subject.settings
    args: dict[str, Any] = dict(settings.kwargs)
    if settings.pooling is not None:
        args["pooling"] = dataclasses.asdict(settings.pooling)
    if subject.is_ours:
        args["img_size"] = settings.img_size
    return args


def _read_config(raw: dict[str, Any]) -> tuple[Model, Data, tuple[str, ...]]:
    config, args = raw["pretrained_cfg"], tuples(dict(raw.get("model_args") or {}))
    num_chans, height, width = config["input_size"]
    if num_chans != 3 or height != width:
        raise ValueError(f"input_size {config['input_size']} is not 3 x a square")
    num_classes = int(raw.get("num_classes") or config["num_classes"])
    labels = raw.get("label_names") or config.get("label_names") or range(num_classes)
    if len(labels) != num_classes:
        raise ValueError(f"{len(labels)} label_names for {num_classes} classes")
    pooling = args.pop("pooling", None)
    settings = Model(
        name=raw["architecture"],
        img_size=height,
        pooling=Pooling(**pooling) if pooling else None,
        kwargs=args,
    )
    ours = raw.get("sovit", {})
    data = Data(
        train="",
        val="",
        batch_size=1,
        crop_pct=config["crop_pct"],
        eval_interpolation=config["interpolation"],
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        eval_mirror=bool(ours.get("eval_mirror", False)),
        exif="rotate" if ours.get("exif") == "rotate" else "ignore",
    )
    # Who wrote it does not choose what else is read here.
    return without_weights(settings), data, tuple(str(label) for label in labels)


def _is_same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)
