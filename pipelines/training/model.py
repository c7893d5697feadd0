"""Build the network that a run's settings describe."""

from __future__ import annotations

import dataclasses
import inspect
import warnings
from collections.abc import Callable
from typing import Any

import timm
import torch
from torch import nn

import sovit
from pipelines.config import Model
from pipelines.storage.redaction import error_summary
from sovit import SecondOrderNet
from sovit.backbones import ARCHITECTURE

# What timm's builder, and ours of networks, take to load weights.
PRETRAINED = ("pretrained", "pretrained_backbone", "checkpoint_path")
# What constructors raise for arguments that they do not know or can't use.
_MISFITS = (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError)


def is_ours(name: str) -> bool:
    """Check whether a name in timm's registry is a network of `sovit`."""
    module = timm.model_entrypoint(name).__module__
    return module.partition(".")[0] == sovit.__name__


def takes_pooling(name: str) -> bool:
    """Check whether a network takes a pooling: ours, and others with the argument."""
    entry = timm.model_entrypoint(name)
    return is_ours(name) or "pooling" in inspect.signature(entry).parameters


def architecture_of(settings: Model) -> tuple[str, dict[str, Any]]:
    """Return timm's name of a network, and its arguments.

    Our networks take `pooling` and `img_size` themselves. Any other model of timm with
    a pooling is the backbone of a `sovit.second_order`; without one it is timm's own,
    and takes its size from `kwargs`: convolutional ones have no such argument.
    """
    name, arguments = settings.name, dict[str, Any](settings.kwargs)
    if settings.pooling is not None:
        arguments["pooling"] = dataclasses.asdict(settings.pooling)
        if not takes_pooling(name):
            name, arguments["backbone"] = ARCHITECTURE, name
            if "pretrained" in arguments:  # timm's weights are the backbone's
                arguments["pretrained_backbone"] = arguments.pop("pretrained")
    if is_ours(name):
        arguments["img_size"] = settings.img_size
    return name, arguments


def title_of(settings: Model) -> str:
    """Return the name of a network for people, with the head put on it."""
    if settings.pooling is None or takes_pooling(settings.name):
        return settings.name
    return f"{settings.name} with a second-order head ({settings.pooling.type})"


def build_model(
    settings: Model,
    *,
    num_classes: int,
    tell: Callable[[str], object] = lambda line: None,
) -> nn.Module:
    """Build the network that the settings describe, with fresh weights.

    Args:
        tell: Called with a warning on tokens too few for the pooling. By default it is
            dropped: the check of a run shows it once, not each of its workers.

    Raises ValueError for a name unknown to timm, and for arguments that don't fit.
    """
    backbone = settings.kwargs.get("backbone", settings.name)
    for field, wanted in (("name", settings.name), ("kwargs.backbone", backbone)):
        # Weights and code that are elsewhere are not for a name to choose.
        if not isinstance(wanted, str) or not timm.is_model(wanted):
            raise ValueError(
                f"model.{field}: expected a model that timm knows, got {wanted!r}; see "
                "timm.list_models(), or name the recipe file that registers it "
                "(sovit-eval, sovit-predict, sovit-export: --code FILE)"
            )
    name, arguments = architecture_of(settings)
    if settings.drop_path_rate:
        arguments["drop_path_rate"] = settings.drop_path_rate
    try:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always", sovit.FewTokensWarning)
            model = timm.create_model(name, num_classes=num_classes, **arguments)
    except (*_MISFITS, RuntimeError) as error:
        is_misfit = isinstance(error, _MISFITS)
        if not is_misfit and any(arguments.get(key) for key in PRETRAINED):
            raise  # of the weights: a store that is away, a file that is damaged
        raise _unfit(settings, error=error) from error
    for one in found:
        if issubclass(one.category, sovit.FewTokensWarning):
            tell(f"{settings.name}: {one.message}")
        else:
            warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)
    return model


def without_weights(settings: Model) -> Model:
    """Remove from a model's settings whatever loads weights."""
    kwargs = {k: v for k, v in settings.kwargs.items() if k not in PRETRAINED}
    return dataclasses.replace(
        settings, kwargs=kwargs, init_from="", init_triangle="auto"
    )


def _unfit(settings: Model, *, error: Exception) -> ValueError:
    """Build the one-line error on arguments that a network doesn't take."""
    name, why = settings.name, error_summary(error)
    if settings.pooling is not None and "'pooling'" in str(error):
        return ValueError(
            f"model.pooling: expected none for {name}, whose network has no place for "
            f"it, got {settings.pooling.type!r}; leave it out, or put a second-order "
            f"head on the network: name {ARCHITECTURE!r}, kwargs {{'backbone': "
            f"{name!r}}}"
        )
    given = dict(settings.kwargs)
    if settings.drop_path_rate:
        given["drop_path_rate"] = settings.drop_path_rate
    known = _known_arguments(settings)
    takes = f"it takes {', '.join(known)}" if known else "see its code in timm"
    return ValueError(
        f"model.kwargs: expected arguments that {name} is made with, got {given} "
        f"({why}); {takes}"
    )


def _known_arguments(settings: Model) -> list[str]:
    """List the arguments of a network, if it can be built without any."""
    kept = {k: v for k, v in settings.kwargs.items() if k == "backbone"}
    plain = dataclasses.replace(settings, kwargs=kept, drop_path_rate=0.0)
    name, arguments = architecture_of(without_weights(plain))
    try:
        with torch.device("meta"):
            model: Any = timm.create_model(name, **arguments)
    except (*_MISFITS, RuntimeError, ValueError):
        return []
    makers: list[Callable[..., Any]] = [type(model)]
    if isinstance(model, SecondOrderNet):
        makers = [sovit.second_order, type(model.backbone)]
    found = (
        p for maker in makers for p in inspect.signature(maker).parameters.values()
    )
    named = dict.fromkeys(p.name for p in found if p.kind is not p.VAR_KEYWORD)
    return [name for name in named if name not in ("backbone", "num_classes", "kwargs")]
