"""Explain weights that no paper's authors released, and how to load them."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from torch import nn

from sovit.shapes import Tensor
from sovit.weights.releases import COUNTER, RELEASES

# Modules that only sovit's own networks have.
_OURS = r"^head\.(pool|fc|fc_class|fc_visual)\.|^backbone\.|\.se\.(channel|spatial)\."
# What sovit puts into a trunk of timm.
_ADDED = r"\.se\.|\.act\.conv\."
_ENOUGH = 0.8


def refuse_folder(source: str | os.PathLike[str]) -> None:
    """Raise ValueError for a folder, naming what wrote it and how to load it."""
    folder = Path(source)
    if not folder.is_dir():
        return
    if (folder / "checkpoint.json").is_file():
        what = (
            "a checkpoint folder of sovit's own; start from it with --model.init-from, "
            "or make a timm folder of it by sovit-export"
        )
    elif (folder / "config.json").is_file():
        what = (
            "a folder that sovit-export or timm wrote; "
            f"timm.create_model('local-dir:{folder}', pretrained=True) loads it"
        )
    else:
        what = "a folder; name the file of weights in it"
    raise ValueError(f"expected a file that authors released, got {source}, {what}")


def describe_stranger(weights: Mapping[str, Tensor], model: nn.Module) -> str | None:
    """Describe weights of no release and how to load them, if recognised."""
    what = _what_it_is(set(weights), model)
    return what and f"expected a file that authors released, got {what}"


def tried(weights: Mapping[str, Tensor]) -> str:
    """Format the message on names of no known release, with those tried."""
    few = ", ".join(sorted(weights)[:3])
    titles = "; ".join(release.title for release in RELEASES)
    return f"Names such as {few} are of no release that is known (tried: {titles}). "


def _what_it_is(names: set[str], model: nn.Module) -> str | None:
    own = {name for name in model.state_dict() if not name.endswith(COUNTER)}
    body = {n for n in own if not re.match(r"(head\.)?(fc|classifier)", n)}
    if body and body <= names:
        return (
            "weights by this model's own names, as sovit and timm save them; load them "
            "with model.load_state_dict, or start a training from the file with "
            "--model.init-from"
        )
    if any(re.search(_OURS, name) for name in names):
        return (
            "weights of another network of sovit's own, by the names that sovit saves; "
            "create that network with its settings and load them with "
            "model.load_state_dict, or start from the file with --model.init-from"
        )
    trunk = {n.removeprefix("backbone.") for n in body if not n.startswith("head.pool")}
    trunk = {n for n in trunk if not re.search(_ADDED, n)}
    if len(trunk & names) >= _ENOUGH * len(trunk) > 0:
        return (
            "weights of the plain backbone, by timm's names, without tensors for what "
            "the paper adds; create the model with pretrained_backbone=True for "
            "timm's, or load them into "
            f"{'model.backbone' if _has_backbone(own) else 'model'} with strict=False"
        )
    for pattern, what in (
        (r"^patch_embed\.proj\.", "vision transformer"),
        (r"^layer1\.0\.conv1\.", "ResNet"),
        (r"^features\.0\.", "VGG, MobileNet or DenseNet"),
    ):
        if any(re.search(pattern, name) for name in names):
            return (
                f"weights of a plain {what}, by timm's or torchvision's names; load "
                "them into timm's model of that name: this network has other tensors"
            )
    return None


def _has_backbone(own: set[str]) -> bool:
    return any(name.startswith("backbone.") for name in own)
