"""Load the papers' released checkpoints into our models.

Their names are those of the So-ViT and SoT releases; ours follow timm. Each of our
tensors knows the one or two of theirs it is made of, so that what is wrong with a file
is told in the file's own names.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from sovit.pooling import CrossCovPool, MultiHeadPool
from sovit.positions import resize_table
from sovit.shapes import Tensor
from sovit.tokens import ConvEmbed
from sovit.vit import SoViT
from sovit.weight_files import find_weights, read_tensors

MAX_NAMES = 5
CLASSIFIERS = {
    "head.fc_class.": "classifier.cls_fc.",
    "head.fc_visual.": "classifier.visual_fc.",
}
EMBED = "visual_tokens.tokens."


class MisfitError(ValueError):
    """Name the tensors of a checkpoint that do not fit a model."""

    def __init__(self, kind: str, names: list[str]) -> None:
        more = "" if len(names) <= MAX_NAMES else ", ..."
        super().__init__(
            f"The checkpoint does not fit the model, {len(names)} tensors are {kind}: "
            f"{'; '.join(names[:MAX_NAMES])}{more}. Create the model that the weights "
            "were trained as; for another number of classes give skip_classifier=True."
        )
        self.kind, self.names = kind, names


def load_official(
    model: nn.Module,
    source: str | os.PathLike[str] | Mapping[str, Any],
    *,
    ema: bool = False,
    skip_classifier: bool = False,
) -> nn.Module:
    """Load a checkpoint of the So-ViT or SoT release and return the model.

    `model` is one of ours, made with the checkpoint's sizes. `source` is a file or what
    it holds: the weights themselves, or a training checkpoint with them under
    "state_dict", "model" or "state_dict_ema", names with or without "module.". `ema`
    takes the averaged weights. `skip_classifier` leaves the model's own classifiers,
    for another number of classes. Position tables of another image size are fitted.
    Files are read without running any code in them.

    Raises ValueError naming the tensors that are missing, unexpected or of another
    shape, and leaves the model as it was then.
    """
    if not isinstance(model, SoViT):
        raise ValueError(
            f"A So-ViT or SoT model was wanted, got {type(model).__name__}: create it "
            "with timm.create_model('so_vit_7') after importing sovit."
        )
    found = source if isinstance(source, Mapping) else read_tensors(source)
    weights = find_weights(found, ema=ema)
    model.load_state_dict(
        convert_state_dict(weights, model, skip_classifier=skip_classifier)
    )
    return model


def is_official(weights: Mapping[str, Any]) -> bool:
    """Tell the So-ViT and SoT release's weights by their names."""
    return any(name.startswith("visual_tokens.") for name in weights)


def checkpoint_filter_fn(state_dict: dict[str, Any], model: SoViT) -> dict[str, Any]:
    """Convert released weights for timm's loader; of our own fit the positions alone.

    Classifiers keep the file's number of classes: the loader drops them where the
    model has another.
    """
    if not is_official(state_dict):
        if "pos_embed" not in state_dict:
            return state_dict
        table = _fitted_table(state_dict["pos_embed"], model)
        return {**state_dict, "pos_embed": table}
    converted = convert_state_dict(state_dict, model, skip_classifier=True)
    for ours, theirs in CLASSIFIERS.items():
        for name in [name for name in converted if name.startswith(ours)]:
            del converted[name]
            its = state_dict.get(name.replace(ours, theirs))
            if its is not None:
                converted[name] = its
    return converted


def convert_state_dict(
    weights: Mapping[str, Tensor], model: SoViT, *, skip_classifier: bool = False
) -> dict[str, Tensor]:
    """Rename and join released weights into a state dict that fits `model` exactly.

    Raises ValueError where they do not fit.
    """
    own = model.state_dict()
    names = {name: official_names(name, model=model) for name in own}
    if skip_classifier:
        names = {n: parts for n, parts in names.items() if not n.startswith("head.fc")}
        prefixes = tuple(CLASSIFIERS.values())
        weights = {n: w for n, w in weights.items() if not n.startswith(prefixes)}
    wanted = {part for parts in names.values() for part in parts}
    _raise_if_any("missing", sorted(wanted - set(weights)))
    _raise_if_any("unexpected", sorted(set(weights) - wanted))

    wrong, converted = [], {}
    for name, parts in names.items():
        tensors = [weights[part] for part in parts]
        if name == "pos_embed":
            tensors = [_fitted_table(tensors[0], model)]
        shapes = _part_shapes(own[name], num_parts=len(parts), model=model)
        for part, tensor, shape in zip(parts, tensors, shapes, strict=True):
            # A 1x1 convolution of theirs is a linear map of ours.
            if tensor.shape not in (shape, (*shape, 1, 1)):
                wrong.append(f"{part} {tuple(tensor.shape)}, the model has {shape}")
        if not wrong:
            converted[name] = _join(tensors).reshape(own[name].shape)
    _raise_if_any("of another shape", wrong)
    return {**own, **converted}


def official_names(name: str, *, model: SoViT) -> tuple[str, ...]:
    """Return the release's names of the tensors that one of ours is made of.

    Raises ValueError for a tensor that no released model has.
    """
    if re.match(r"cls_token$|pos_embed$|blocks\.|norm\.", name):
        return (name,)
    if name.startswith("patch_embed.") and isinstance(model.patch_embed, ConvEmbed):
        return (EMBED + _official_embed_name(name.removeprefix("patch_embed.")),)
    for ours, theirs in CLASSIFIERS.items():
        if name.startswith(ours):
            return (theirs + name.removeprefix(ours),)
    pool_names = _OFFICIAL_POOL.get(type(model.head.pool), {})
    for ours, parts in pool_names.items():
        if name.startswith(ours):
            return tuple(part + name.removeprefix(ours) for part in parts)
    raise ValueError(
        "A model of the released kinds was wanted (token_embed 'resnet' or 'densenet', "
        f"fusion 'sum', 'class' or 'visual'), got one with {name}: create the model "
        "as the checkpoint's was."
    )


def _official_embed_name(name: str) -> str:
    """Translate a name inside the token embedding."""
    name = re.sub(r"^stem\.", "stem.0.", name)
    name = re.sub(r"^proj\.", "transition.", name)
    dense = re.match(r"stages\.(\d+)\.layers\.(\d+)\.(.*)", name)
    if dense:
        stage, layer, rest = int(dense[1]), int(dense[2]), dense[3]
        return f"stage.{2 * stage}.denselayer{layer + 1}.{rest}"
    transition = re.match(r"stages\.(\d+)\.((?:norm|conv)\..*)", name)
    if transition:
        return f"stage.{2 * int(transition[1]) + 1}.{transition[2]}"
    return re.sub(r"^stages\.", "stage.", name)


_REPRESENTATION = "classifier.representation."
_OFFICIAL_POOL: Mapping[type, Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        CrossCovPool: {
            "head.pool.reduction.": (
                f"{_REPRESENTATION}conv_dr_block.0.0.",
                f"{_REPRESENTATION}conv_dr_block.1.0.",
            ),
            "head.pool.norm.": (
                f"{_REPRESENTATION}conv_dr_block.0.1.",
                f"{_REPRESENTATION}conv_dr_block.1.1.",
            ),
            "head.pool.normalize.start": ("classifier.normalization.weight",),
        },
        MultiHeadPool: {
            "head.pool.reduction.": (f"{_REPRESENTATION}wr.",),
            "head.pool.normalize.start": (f"{_REPRESENTATION}norm.weight",),
        },
    }
)


def _part_shapes(own: Tensor, *, num_parts: int, model: SoViT) -> list[tuple[int, ...]]:
    """Return the shapes of the parts that one of our tensors is made of."""
    if num_parts == 1 or own.ndim == 0:
        return [tuple(own.shape)] * num_parts
    assert isinstance(model.head.pool, CrossCovPool)
    pooling = model.head.pool.pooling
    dims = [pooling.num_heads * dim for dim in pooling.reduced_dims]
    return [(dim, *own.shape[1:]) for dim in dims]


def _join(tensors: list[Tensor]) -> Tensor:
    """Concatenate the parts of one tensor; of scalars, which are counts, take one."""
    if len(tensors) == 1 or tensors[0].ndim == 0:
        return tensors[0]
    return torch.cat(tensors)


def _fitted_table(table: Tensor, model: SoViT) -> Tensor:
    if table.ndim == 3 and table.shape[-1] == model.embed_dim:
        return resize_table(table, grid_size=model.grid_size)
    return table


def _raise_if_any(kind: str, names: list[str]) -> None:
    if names:
        raise MisfitError(kind, names)
