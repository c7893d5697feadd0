"""Load the papers' released checkpoints into our models.

Their names are those of the authors' code; ours follow timm. Each of our tensors is
mapped to the one or two of theirs it is made of, so that errors are reported in the
file's own names. `sovit.weights.releases` has the names.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import nn

from sovit.architectures.backbones import SecondOrderNet
from sovit.architectures.tokens import ConvEmbed
from sovit.architectures.vit import SoViT, resize_table
from sovit.pooling import CovPool, CrossCovPool, MultiHeadPool, Pooling
from sovit.shapes import Tensor
from sovit.weights.releases import (
    COUNTER,
    COV_MOBILENET,
    ECA_MOBILENET,
    SO_VIT,
    Names,
    Release,
    names_by_order,
    names_by_rules,
    plain_names,
    read_settings,
    recognise,
    release_of,
)
from sovit.weights.strangers import describe_stranger, refuse_folder, tried
from sovit.weights.triangles import find_triangle, reorder_triangle
from sovit.weights.weight_files import find_weights, read_tensors

logger = logging.getLogger(__name__)

MAX_NAMES = 5
EMBED = "visual_tokens.tokens."


class MisfitError(ValueError):
    """Raised when tensors of a checkpoint do not fit a model, naming them."""

    def __init__(self, kind: str, names: list[str], *, hint: str = "") -> None:
        more = "" if len(names) <= MAX_NAMES else ", ..."
        super().__init__(
            f"The checkpoint does not fit the model, {len(names)} tensors are {kind}: "
            f"{'; '.join(names[:MAX_NAMES])}{more}. {hint}Create the model that the "
            "weights were trained as; for another number of classes give "
            "skip_classifier=True."
        )
        self.kind, self.names, self.hint = kind, names, hint


@dataclass(frozen=True, kw_only=True)
class Converted:
    """Released weights under our names, with a report."""

    weights: dict[str, Tensor]
    report: str
    """One line: the family, the triangle, how many tensors, what was left out."""


def load_official(
    model: nn.Module,
    source: str | os.PathLike[str] | Mapping[str, Any],
    *,
    triangle: str | None = None,
    ema: bool = False,
    skip_classifier: bool = False,
) -> nn.Module:
    """Load a checkpoint that a paper's authors released and return the model.

    So-ViT, SoT, MPN-COV and iSQRT-COV (fast-MPN-COV: ResNet, VGG), the optimisation
    study (ResNet, MobileNetV2), GSoP-Net 1 and 2, ECA-Net (ResNet, MobileNetV2), by the
    names of their authors' code. `model` is one of ours, made with the checkpoint's
    sizes. `source` is a file (`torch.save`'s or safetensors) or what it holds: the
    weights themselves, or a training checkpoint with them under "state_dict", "model"
    or "state_dict_ema", names with or without "module.". What was taken is logged.

    Args:
        triangle: Which triangle of the covariance, "upper" or "lower", the file's
            classifier was trained on; its columns are put into our order. Shapes don't
            tell. By default lower for GSoP, upper for the others; fast-MPN-COV before
            its commit e68a5ee (2018-12-26) has the lower one too.
        ema: Take the averaged weights.
        skip_classifier: Leave the model's own classifiers, for another number of
            classes.

    Position tables of another image size are fitted. BatchNorm counters, which files
    of PyTorch 0.4 lack, are 0 then. Files are read without running any code in them.

    Raises ValueError saying what the file is instead, or naming the tensors that are
    missing, unexpected or of another shape and the settings that differ; it leaves the
    model as it was then.
    """
    if not isinstance(source, Mapping):
        refuse_folder(source)
    found = source if isinstance(source, Mapping) else read_tensors(source)
    converted = convert(
        find_weights(found, ema=ema),
        model,
        triangle=triangle,
        classifier="skip" if skip_classifier else "same",
    )
    model.load_state_dict({**model.state_dict(), **converted.weights})
    logger.info("Loaded %s", converted.report)
    return model


def is_official(weights: Mapping[str, Any]) -> bool:
    """Check by their names whether weights are the authors' released ones."""
    return recognise(plain_names(weights)) is not None


def checkpoint_filter_fn(
    state_dict: dict[str, Any], model: nn.Module
) -> dict[str, Any]:
    """Convert released weights for timm's loader; of our own, fit positions alone.

    Classifiers keep the file's number of classes: the loader drops them where the
    model has another.
    """
    if is_official(state_dict):
        return convert(state_dict, model, classifier="any").weights
    if isinstance(model, SoViT) and "pos_embed" in state_dict:
        table = _fitted_table(state_dict["pos_embed"], model)
        return {**state_dict, "pos_embed": table}
    return state_dict


def convert(
    weights: Mapping[str, Tensor],
    model: nn.Module,
    *,
    triangle: str | None = None,
    classifier: Literal["same", "skip", "any"] = "same",
) -> Converted:
    """Rename and join released weights into tensors that fit `model`.

    `classifier` "skip" leaves it out; with "any" it has the file's number of classes,
    or is missing where the file has none. Raises ValueError where they do not fit.
    """
    weights = plain_names(weights)
    release = _release(weights, model)
    order = find_triangle(triangle, release=release, model=model)
    names = _names(release, model=model, weights=weights)
    heads = {
        name: part
        for name, (part, *_) in names.parts.items()
        if name.startswith(tuple(ours for ours, _ in names.classifier))
    }
    body, parts = weights, names.parts
    if classifier != "same":
        theirs = tuple(prefix for _, prefix in names.classifier)
        parts = {name: part for name, part in parts.items() if name not in heads}
        body = {n: w for n, w in weights.items() if not n.startswith(theirs)}
    counters = _missing_counters(parts, weights=body)
    known = {part for found in names.parts.values() for part in found}
    is_strange = len(known & weights.keys()) < len(weights) / 2
    hint = tried(weights) if is_strange and not recognise(weights) else ""
    converted = _joined({**body, **counters}, parts=parts, model=model, hint=hint)
    if classifier == "any":
        converted |= {n: weights[part] for n, part in heads.items() if part in weights}
    if order == "lower":
        reorder_triangle(converted, model=model)
    report = [f"{len(body) if classifier == 'skip' else len(weights)} tensors of "]
    report.append(release.title)
    if order:
        report.append(f", {order} triangle{'' if triangle else ' (the default)'}")
    if classifier == "skip":
        report.append(f", without the classifier ({len(weights) - len(body)} tensors)")
    if counters:
        report.append(f"; {len(counters)} BatchNorm counters are not in it and are 0")
    report.append(_unseen(model, release=release))
    return Converted(weights=converted, report="".join(report))


def _release(weights: Mapping[str, Tensor], model: nn.Module) -> Release:
    """Return the release that a file is of and the model takes, or raise ValueError."""
    found, wanted = recognise(weights), release_of(model)
    if found is not None and found is not wanted:
        raise ValueError(
            f"expected {found.model} for this file, which holds {found.title}, got "
            f"{type(model).__name__}; create it with "
            f"timm.create_model({found.example!r}) after importing sovit"
        )
    if found is None and (said := describe_stranger(weights, model)):
        raise ValueError(said)
    if wanted is None:
        raise ValueError(
            "expected a network of the papers (So-ViT, SoT, or one of "
            "timm.list_models('*isqrt*'), '*gsop*', '*eca_*'), got "
            f"{type(model).__name__}; create it by its name after importing sovit"
        )
    pool = model.head.pool if isinstance(model, SecondOrderNet) else None
    if wanted.triangle and not isinstance(pool, CovPool):
        raise ValueError(
            f"expected {wanted.model} of the released kinds (pooling='isqrt_cov', "
            f"fusion='visual'), got one with {type(pool).__name__}; create the model "
            f"as the checkpoint's was, such as {wanted.example}"
        )
    if found is None and wanted in (COV_MOBILENET, ECA_MOBILENET):
        raise ValueError(
            f"{tried(weights)}This model takes {wanted.title}: see where it is from."
        )
    return wanted


def _names(
    release: Release, *, model: nn.Module, weights: Mapping[str, Tensor]
) -> Names:
    own = model.state_dict()
    if isinstance(model, SoViT):
        parts = {name: official_names(name, model=model) for name in own}
        return Names(parts=parts, classifier=release.classifier)
    if not release.rules:
        return names_by_order(model, own, weights)
    return names_by_rules(release, own)


def _missing_counters(
    parts: Mapping[str, tuple[str, ...]], *, weights: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return zeros for counters that a file of an old PyTorch lacks."""
    wanted = {part for names in parts.values() for part in names}
    return {
        name: torch.tensor(0)
        for name in wanted - set(weights)
        if name.endswith(COUNTER)
        and f"{name.removesuffix(COUNTER)}running_mean" in weights
    }


def _joined(
    weights: Mapping[str, Tensor],
    *,
    parts: Mapping[str, tuple[str, ...]],
    model: nn.Module,
    hint: str,
) -> dict[str, Tensor]:
    """Build our tensors from the file's; raise MisfitError where one doesn't fit."""
    own = model.state_dict()
    hint = hint or _settings_that_differ(weights, parts=parts, own=own)
    wanted = {part for names in parts.values() for part in names}
    _raise_if_any("missing", sorted(wanted - set(weights)), hint=hint)
    _raise_if_any("unexpected", sorted(set(weights) - wanted), hint=hint)
    wrong, converted = [], {}
    for name, names in parts.items():
        tensors = [weights[part] for part in names]
        if name == "pos_embed" and isinstance(model, SoViT):
            tensors = [_fitted_table(tensors[0], model)]
        shapes = _part_shapes(own[name], num_parts=len(names), model=model)
        for part, tensor, shape in zip(names, tensors, shapes, strict=True):
            # A 1x1 convolution of theirs is a linear map of ours.
            if tensor.shape not in (shape, (*shape, 1, 1)):
                wrong.append(f"{part} {tuple(tensor.shape)}, the model has {shape}")
        if not wrong:
            converted[name] = _join(tensors).reshape(own[name].shape)
    _raise_if_any("of another shape", wrong, hint=hint)
    return converted


def _settings_that_differ(
    weights: Mapping[str, Tensor],
    *,
    parts: Mapping[str, tuple[str, ...]],
    own: Mapping[str, Tensor],
) -> str:
    """Describe the settings in which a file and a model differ."""
    ours = {part: tuple(own[name].shape) for name, (part, *_) in parts.items()}
    model = read_settings(ours)
    file = read_settings({name: tuple(w.shape) for name, w in weights.items()})
    differ = [
        f"{name} {file.get(name)!r}, the model {model.get(name)!r}"
        for name in {**file, **model}
        if file.get(name) != model.get(name)
    ]
    return f"The file has {'; '.join(differ)}. " if differ else ""


# Of a pooling, what no tensor shows.
_UNSEEN = ("normalizer", "num_iterations", "coefficients", "pre_norm", "centering")


def _unseen(model: nn.Module, *, release: Release) -> str:
    """Describe the model's differences from the release that no tensor shows."""
    if release.num_iterations is None or not isinstance(model, SecondOrderNet):
        return ""
    pool = model.head.pool
    assert isinstance(pool, CovPool)
    theirs = Pooling.named("isqrt_cov", num_iterations=release.num_iterations)
    pairs = {n: (getattr(theirs, n), getattr(pool.pooling, n)) for n in _UNSEEN}
    differ = [f"{n} {a!r}, the model {b!r}" for n, (a, b) in pairs.items() if a != b]
    return f"; the release has {'; '.join(differ)}" if differ else ""


def official_names(name: str, *, model: SoViT) -> tuple[str, ...]:
    """Return the release's names of the tensors that one of ours is made of.

    Raises ValueError for a tensor that no released model has.
    """
    if re.match(r"cls_token$|pos_embed$|blocks\.|norm\.", name):
        return (name,)
    if name.startswith("patch_embed.") and isinstance(model.patch_embed, ConvEmbed):
        return (EMBED + _official_embed_name(name.removeprefix("patch_embed.")),)
    for ours, theirs in SO_VIT.classifier:
        if name.startswith(ours):
            return (theirs + name.removeprefix(ours),)
    pool_names = _OFFICIAL_POOL.get(type(model.head.pool), {})
    for ours, parts in pool_names.items():
        if name.startswith(ours):
            return tuple(part + name.removeprefix(ours) for part in parts)
    raise ValueError(
        "expected a model of the released kinds (token_embed 'resnet' or 'densenet', "
        f"fusion 'sum', 'class' or 'visual'), got one with {name}; create the model as "
        "the checkpoint's was"
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


def _part_shapes(
    own: Tensor, *, num_parts: int, model: nn.Module
) -> list[tuple[int, ...]]:
    """Return the shapes of the parts that one of our tensors is made of."""
    if num_parts == 1 or own.ndim == 0:
        return [tuple(own.shape)] * num_parts
    assert isinstance(model, SoViT)
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


def _raise_if_any(kind: str, names: list[str], *, hint: str) -> None:
    if names:
        raise MisfitError(kind, names, hint=hint)
