"""Load a trained model, and build its card: what users have to know."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from pipelines.checkpoints.manifest import load_model, opened
from pipelines.checkpoints.snapshot import EMA_FILE
from pipelines.config import Data, Model
from pipelines.export.names import readable_names
from pipelines.training.model import architecture_of, without_weights

Weights = Literal["auto", "ema", "raw"]


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A trained model in evaluation mode, and how its images are prepared."""

    model: nn.Module
    settings: Model
    data: Data
    classes: tuple[str, ...]
    origin: Mapping[str, Any]
    """Where it comes from: recipe, weights, epoch, step and metrics, if known."""
    descriptions: Mapping[str, str] = field(default_factory=dict)
    """Readable name of each class, if its folder has them."""

    @property
    def names(self) -> Mapping[str, str]:
        """Readable name of each class; empty if unknown."""
        return self.descriptions or readable_names(self.classes)

    @property
    def img_size(self) -> int:
        """Height and width of the input images."""
        return self.settings.img_size


def from_checkpoint(address: str, *, weights: Weights = "auto") -> Subject:
    """Load a checkpoint from a folder or bucket; `auto` prefers the moving average.

    Raises ValueError where it is none, it is damaged, or it has no such weights.
    """
    ema = {"auto": None, "ema": True, "raw": False}[weights]
    with opened(address) as folder:
        model, manifest = load_model(folder, ema=ema)
    is_average = EMA_FILE in manifest.files and weights != "raw"
    return Subject(
        model=model,
        settings=without_weights(manifest.run.model),
        data=manifest.run.data,
        classes=manifest.classes,
        origin={
            "recipe": manifest.run.recipe,
            "weights": "ema" if is_average else "raw",
            "epoch": manifest.position.epoch,
            "step": manifest.position.step,
            # JSON has no word for what is not finite.
            "metrics": {
                name: value
                for name, value in manifest.metrics.items()
                if math.isfinite(value)
            },
        },
    )


def card(subject: Subject) -> dict[str, Any]:
    """Build the card of plain values that a user of the model needs.

    docs/using.md explains each of them; every exported file carries them all.
    """
    data, names = subject.data, subject.names
    architecture, arguments = architecture_of(subject.settings)
    return {
        "architecture": architecture,
        **{key: arguments[key] for key in ("backbone",) if key in arguments},
        "img_size": subject.img_size,
        "crop_pct": data.crop_pct,
        "interpolation": data.eval_interpolation,
        "mean": list(data.mean),
        "std": list(data.std),
        "eval_mirror": data.eval_mirror,
        "exif": data.exif,
        "classes": list(subject.classes),
        **({"names": [names[label] for label in subject.classes]} if names else {}),
        **subject.origin,
    }
