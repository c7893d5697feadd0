"""Trained backbones whose tokens are cached: model, weights and their origin."""

from __future__ import annotations

import dataclasses
import zlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pipelines.checkpoints.manifest import (
    find_manifest,
    load_model,
    load_model_code,
    opened,
)
from pipelines.checkpoints.pretrained import load_initial
from pipelines.config import Model, Run
from pipelines.storage.path import StoragePath
from pipelines.training.model import PRETRAINED, build_model, without_weights
from sovit.architectures.trunks import image_shape


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """Everything an actor needs to build the model, on any node."""

    model: Model
    """Settings that load no weights."""
    num_classes: int
    weights: dict[str, Tensor]
    shape: tuple[int, ...]
    """Shape of `forward_features`' output for one image."""
    source: str
    """Origin of the weights, for messages."""

    @property
    def made_of(self) -> dict[str, Any]:
        """What the tokens depend on: architecture and weights, not the head."""
        model = dataclasses.asdict(self.model)
        for name in ("pooling", "drop_path_rate", "init_from", "init_triangle"):
            del model[name]
        return {"model": model, "weights": self._digest}

    @property
    def _digest(self) -> str:
        crc = 0
        for name, tensor in sorted(self.weights.items()):
            if not name.startswith("head."):
                content = tensor.contiguous().reshape(-1).view(torch.uint8)
                crc = zlib.crc32(content.numpy().data, zlib.crc32(name.encode(), crc))
        return f"{crc:08x}"

    def build(self) -> nn.Module:
        """Build the model with its weights, in evaluation mode."""
        model = build_model(self.model, num_classes=self.num_classes)
        model.load_state_dict(self.weights)
        return model.eval()


def load_backbone(run: Run, *, checkpoint: str, num_classes: int) -> Backbone:
    """Load the backbone that computes a run's tokens.

    Args:
        checkpoint: A checkpoint of ours, whose moving average is taken where it has
            one and whose settings count then, not the run's; or any other start that
            `read_start` knows, for the run's model. If empty, what that starts from:
            `model.init_from`, or weights that `model.kwargs` ask timm for.

    Raises ValueError where that is none of them, or there are no weights at all.
    """
    source = checkpoint or run.model.init_from
    if source and find_manifest(StoragePath(source)) is not None:
        load_model_code(source)
        with opened(source) as folder:
            model, manifest = load_model(folder)
        settings, num_classes = manifest.run.model, len(manifest.classes)
    elif source:
        model = build_model(without_weights(run.model), num_classes=num_classes)
        load_initial(model, source, classes=(), triangle=run.model.triangle)
        settings = run.model
    elif any(run.model.kwargs.get(name) for name in PRETRAINED):
        model = build_model(run.model, num_classes=num_classes)
        settings, source = run.model, f"{run.model.name} with its released weights"
    else:
        raise ValueError(
            f"expected a trained backbone, got {run.model.name!r} with fresh weights; "
            "give a checkpoint, or set --model.init-from or pretrained in model.kwargs"
        )
    return Backbone(
        model=without_weights(settings),
        num_classes=num_classes,
        weights={name: value.detach() for name, value in model.state_dict().items()},
        shape=feature_shape(model, img_size=settings.img_size),
        source=str(StoragePath(source)),
    )


def feature_shape(model: nn.Module, *, img_size: int) -> tuple[int, ...]:
    """Infer the shape of one image's features on the meta device.

    Raises ValueError where they are not tokens or one map.
    """
    state = {
        f"model.{name}": torch.empty_like(tensor, device="meta")
        for name, tensor in model.state_dict(keep_vars=True).items()
    }
    channels, _, _ = image_shape(model)
    image = torch.zeros(2, channels, img_size, img_size, device="meta")
    with torch.inference_mode():
        found = torch.func.functional_call(_Features(model), state, (image,))
    if not isinstance(found, Tensor):
        raise ValueError(
            "model.name: expected a model whose features are one tensor, got "
            f"{type(model).__name__} with {type(found).__name__}; choose another"
        )
    return tuple(found.shape[1:])


class _Features(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Any:
        return self.model.forward_features(images)  # pyright: ignore[reportCallIssue]
