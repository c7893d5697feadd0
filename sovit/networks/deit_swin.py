"""DeiT and Swin with SoT's embedding and head: `timm.create_model("deit_tiny_so")`.

SoT (arXiv 2104.10935v2) reports them beside its own models but releases neither their
code nor their settings. Here the embedding is SoT's DenseNet-like one, for Swin (arXiv
2103.14030) one vector for 4x4 pixels; positions, norms and blocks are those of timm's
backbone. The head has SoT's six cross-covariances, as wide as brings the parameters
nearest to the printed ones, and SoT's dropout at about that width. Swin has no class
token: the visual tokens alone classify.
"""

from __future__ import annotations

from typing import Any

from timm.models import register_model
from torch import nn

from sovit.architectures.backbones import second_order
from sovit.networks.build import create, paper_cfg
from sovit.pooling import Pooling
from sovit.shapes import Number

FIRST_CONV = "backbone.patch_embed.proj.stem"


def _cfg(*classifier: str) -> dict[str, Any]:
    return paper_cfg(
        title="SoT: Delving Deeper into Classification Head for Transformer",
        ids="arXiv:2104.10935",
        origin="https://github.com/jiangtaoxie/SoT",
        first_conv=FIRST_CONV,
        classifier=classifier,
        fixed_input_size=True,
        interpolation="bicubic",
    )


default_cfgs = {
    "deit_tiny_so": _cfg("head.fc_class", "head.fc_visual"),
    "deit_base_so": _cfg("head.fc_class", "head.fc_visual"),
    "swin_tiny_so": _cfg("head.fc_visual"),
    "swin_base_so": _cfg("head.fc_visual"),
}


def _create(
    name: str,
    *,
    backbone: str,
    reduced_dim: int,
    usual_drop_rate: Number,
    pretrained: bool,
    **kwargs: Any,
) -> nn.Module:
    pooling = Pooling.named("multi_head_svpn", reduced_dim=reduced_dim)
    return create(
        second_order,
        name=name,
        pretrained=pretrained,
        defaults={
            "backbone": backbone,
            "pooling": pooling,
            "token_embed": "densenet",
            "drop_rate": usual_drop_rate,
        },
        # As timm has it for either: three blocks of a DeiT, four stages of a Swin.
        feature_indices=3 if backbone.startswith("deit") else 4,
        **kwargs,
    )


@register_model
def deit_tiny_so(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Build DeiT-Ti with SoT's head of 6 x 14 x 14: 7.05 M parameters, 7.0 printed."""
    return _create(
        "deit_tiny_so",
        backbone="deit_tiny_patch16_224",
        reduced_dim=14,
        usual_drop_rate=0.0,
        pretrained=pretrained,
        **kwargs,
    )


@register_model
def deit_base_so(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Build DeiT-B with SoT's head of 6 x 37 x 37: 94.88 M parameters, 94.9 printed."""
    return _create(
        "deit_base_so",
        backbone="deit_base_patch16_224",
        reduced_dim=37,
        usual_drop_rate=0.7,
        pretrained=pretrained,
        **kwargs,
    )


@register_model
def swin_tiny_so(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Build Swin-T with SoT's head of 6 x 24 x 24: 31.45 M parameters, 31.6 printed."""
    return _create(
        "swin_tiny_so",
        backbone="swin_tiny_patch4_window7_224",
        reduced_dim=24,
        usual_drop_rate=0.5,
        pretrained=pretrained,
        **kwargs,
    )


@register_model
def swin_base_so(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Build Swin-B with SoT's head of 6 x 37 x 37: 95.67 M parameters, 95.9 printed."""
    return _create(
        "swin_base_so",
        backbone="swin_base_patch4_window7_224",
        reduced_dim=37,
        usual_drop_rate=0.7,
        pretrained=pretrained,
        **kwargs,
    )
