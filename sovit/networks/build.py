"""Shared parts of the papers' networks: configurations, and building through timm."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg
from torch import nn

from sovit.architectures.trunks import placed
from sovit.head import classifier_names
from sovit.pooling import as_pooling
from sovit.weights.official import checkpoint_filter_fn


def paper_cfg(
    *,
    title: str,
    ids: str,
    origin: str,
    first_conv: str,
    classifier: str | tuple[str, ...],
    **more: Any,
) -> dict[str, Any]:
    """Return timm's configuration of a paper's network, for ImageNet at 224x224."""
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": None,
        "crop_pct": 0.875,
        "interpolation": "bilinear",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": first_conv,
        "classifier": classifier,
        "paper_name": title,
        "paper_ids": ids,
        "origin_url": origin,
        **more,
    }


def feature_cfg(num_features: int | None) -> dict[str, Any]:
    """Return the settings of timm's feature extraction: see `create`.

    New for each network, since the builder changes it.
    """
    if num_features is None:
        return {}
    return {"feature_cls": "getter", "out_indices": num_features}


def create(
    build: Callable[..., nn.Module],
    *,
    name: str,
    pretrained: bool,
    defaults: Mapping[str, Any],
    feature_indices: int | None = None,
    **kwargs: Any,
) -> Any:
    """Build a registered network from its own settings, overridden by the caller's.

    With `features_only` it returns its last `feature_indices` features, where that is
    set, by `forward_intermediates`; else timm takes the network apart.

    `pooling` may be a mapping of the fields to change, or a method's name. Raises
    ValueError for pretrained weights that nobody publishes at an address that can be
    fetched.
    """
    check_weights(kwargs, name=name, pretrained=pretrained)
    kwargs = with_tuples(kwargs)
    if "pooling" in kwargs and "pooling" in defaults:
        kwargs["pooling"] = as_pooling(kwargs["pooling"], default=defaults["pooling"])
    settings = {**defaults, **kwargs}
    device, dtype = settings.pop("device", None), settings.pop("dtype", None)
    if settings.get("fusion") is not None:
        # Which layers weights of other classes are not loaded into.
        layers = classifier_names(settings["fusion"])
        overlay = {"classifier": tuple(f"head.{layer}" for layer in layers)}
        given = settings.get("pretrained_cfg_overlay") or {}
        settings["pretrained_cfg_overlay"] = {**overlay, **given}
    with placed(device):
        model = build_model_with_cfg(
            build,  # pyright: ignore[reportArgumentType]
            name,
            pretrained,
            pretrained_filter_fn=checkpoint_filter_fn,
            feature_cfg=feature_cfg(feature_indices),
            **settings,
        )
    return model if dtype is None else model.to(dtype=dtype)


def check_weights(kwargs: Mapping[str, Any], *, name: str, pretrained: bool) -> None:
    """Raise ValueError if pretrained weights are requested without a source."""
    overlay = kwargs.get("pretrained_cfg_overlay")
    if pretrained and not (overlay or kwargs.get("pretrained_cfg")):
        raise ValueError(
            f"pretrained=True: expected published weights, got {name}, which has none; "
            "set pretrained_backbone=True for timm's weights of the backbone, or say "
            "where the network's own are with pretrained_cfg_overlay={'file': ...}"
        )


def with_tuples(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments with tuples for lists: timm's records come from JSON."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in kwargs.items()}
