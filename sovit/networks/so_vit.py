"""The models by name, in timm's registry: `timm.create_model("so_vit_7")`.

Widths and depths are those of the papers' released code: So-ViT (arXiv 2104.10935v1)
and SoT (v2). Their authors publish no weights at an address that can be fetched.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, register_model
from torch import nn

from sovit.architectures.trunks import placed
from sovit.architectures.vit import SoViT
from sovit.head import classifier_names
from sovit.networks.build import feature_cfg, with_tuples
from sovit.pooling import Pooling, as_pooling
from sovit.shapes import Number
from sovit.weights.official import checkpoint_filter_fn


def _so_vit(
    *,
    depth: int,
    embed_dim: int,
    num_heads: int,
    mlp_ratio: Number,
    reduced_dim: tuple[int, int],
    drop_rate: Number = 0.0,
) -> dict[str, Any]:
    pooling = Pooling.named("svpn", reduced_dim=reduced_dim)
    return {
        "depth": depth,
        "embed_dim": embed_dim,
        "num_heads": num_heads,
        "mlp_ratio": mlp_ratio,
        "token_embed": "resnet",
        "pooling": pooling,
        "drop_rate": drop_rate,
    }


def _sot(
    *,
    depth: int,
    embed_dim: int,
    num_heads: int,
    mlp_ratio: Number,
    reduced_dim: int,
    drop_rate: Number = 0.0,
) -> dict[str, Any]:
    pooling = Pooling.named("multi_head_svpn", reduced_dim=reduced_dim)
    return {
        "depth": depth,
        "embed_dim": embed_dim,
        "num_heads": num_heads,
        "mlp_ratio": mlp_ratio,
        "token_embed": "densenet",
        "pooling": pooling,
        "drop_rate": drop_rate,
    }


ARCHITECTURES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "so_vit_7": _so_vit(
            depth=7, embed_dim=256, num_heads=4, mlp_ratio=2, reduced_dim=(48, 24)
        ),
        "so_vit_10": _so_vit(
            depth=10, embed_dim=256, num_heads=4, mlp_ratio=2, reduced_dim=(48, 24)
        ),
        "so_vit_14": _so_vit(
            depth=14,
            embed_dim=384,
            num_heads=6,
            mlp_ratio=3,
            reduced_dim=(64, 48),
            drop_rate=0.5,
        ),
        "so_vit_19": _so_vit(
            depth=19,
            embed_dim=448,
            num_heads=7,
            mlp_ratio=3,
            reduced_dim=(96, 48),
            drop_rate=0.5,
        ),
        "sot_tiny": _sot(
            depth=12, embed_dim=240, num_heads=4, mlp_ratio=2.5, reduced_dim=14
        ),
        "sot_small": _sot(
            depth=14,
            embed_dim=384,
            num_heads=6,
            mlp_ratio=3.5,
            reduced_dim=24,
            drop_rate=0.5,
        ),
        "sot_base": _sot(
            depth=24,
            embed_dim=528,
            num_heads=8,
            mlp_ratio=3,
            reduced_dim=38,
            drop_rate=0.7,
        ),
    }
)


# What timm's builder takes besides the arguments of the model itself.
BUILDER_KEYWORDS = (
    "pretrained_cfg",
    "pretrained_model_args",
    "cache_dir",
    "features_only",
    "out_indices",
    "feature_cls",
)
NUM_FEATURES = 3


def _default_cfg() -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": None,
        "fixed_input_size": True,
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.stem",
        "classifier": ("head.fc_class", "head.fc_visual"),
        "paper_name": "So-ViT: Mind Visual Tokens for Vision Transformer",
        "paper_ids": "arXiv:2104.10935",
        "origin_url": "https://github.com/jiangtaoxie/So-ViT",
    }


default_cfgs = {name: _default_cfg() for name in ARCHITECTURES}


def default_pooling(name: str) -> Pooling:
    """Return a model's default pooling settings."""
    if name not in ARCHITECTURES:
        raise ValueError(
            f"expected a model name of {list(ARCHITECTURES)}, got {name!r}; choose one "
            "of these"
        )
    return ARCHITECTURES[name]["pooling"]


def _create(name: str, *, pretrained: bool, **kwargs: Any) -> nn.Module:
    """Build a model: the named architecture, with whatever arguments override it."""
    overlay = kwargs.pop("pretrained_cfg_overlay", None)
    if pretrained and not (overlay or kwargs.get("pretrained_cfg")):
        raise ValueError(
            f"pretrained=True: expected published weights, got {name}, which has none; "
            "create it with pretrained=False and load a file with sovit.load_official, "
            "or say where they are with pretrained_cfg_overlay={'file': ...}"
        )
    device, dtype = kwargs.pop("device", None), kwargs.pop("dtype", None)
    _check_keywords(name, kwargs)
    arguments = {"fusion": "sum", **ARCHITECTURES[name], **with_tuples(kwargs)}
    arguments["pooling"] = as_pooling(
        arguments["pooling"] or {}, default=default_pooling(name)
    )
    first_conv = "proj" if arguments["token_embed"] == "linear" else "stem"
    names = {
        "first_conv": f"patch_embed.{first_conv}",
        "classifier": tuple(
            f"head.{fc}" for fc in classifier_names(arguments["fusion"])
        ),
    }
    with placed(device):
        model = build_model_with_cfg(
            SoViT,
            name,
            pretrained,
            pretrained_cfg_overlay={**names, **(overlay or {})},
            pretrained_filter_fn=checkpoint_filter_fn,
            feature_cfg=feature_cfg(NUM_FEATURES),
            **arguments,
        )
    return model if dtype is None else model.to(dtype=dtype)


def _check_keywords(name: str, kwargs: Mapping[str, Any]) -> None:
    of_builder = (*BUILDER_KEYWORDS, "device", "dtype")
    known = [*inspect.signature(SoViT).parameters, *of_builder]
    unknown = sorted(set(kwargs) - set(known))
    if unknown:
        raise TypeError(
            f"{name}: expected keywords of {known}, got {unknown}; check the spelling"
        )


@register_model
def so_vit_7(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Build So-ViT-7: 7 blocks of width 256, cross-covariance of 48 x 24."""
    return _create("so_vit_7", pretrained=pretrained, **kwargs)


@register_model
def so_vit_10(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Build So-ViT-10: 10 blocks of width 256, cross-covariance of 48 x 24."""
    return _create("so_vit_10", pretrained=pretrained, **kwargs)


@register_model
def so_vit_14(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Build So-ViT-14: 14 blocks of width 384, cross-covariance of 64 x 48."""
    return _create("so_vit_14", pretrained=pretrained, **kwargs)


@register_model
def so_vit_19(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Build So-ViT-19: 19 blocks of width 448, cross-covariance of 96 x 48."""
    return _create("so_vit_19", pretrained=pretrained, **kwargs)


@register_model
def sot_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Build SoT-Tiny: 12 blocks of width 240, six cross-covariances of 14 x 14."""
    return _create("sot_tiny", pretrained=pretrained, **kwargs)


@register_model
def sot_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Build SoT-Small: 14 blocks of width 384, six cross-covariances of 24 x 24."""
    return _create("sot_small", pretrained=pretrained, **kwargs)


@register_model
def sot_base(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Build SoT-Base: 24 blocks of width 528, six cross-covariances of 38 x 38."""
    return _create("sot_base", pretrained=pretrained, **kwargs)
