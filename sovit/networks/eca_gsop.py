"""ECA-Net and GSoP-Net by name: `timm.create_model("eca_resnet50")`.

ECA-Net (arXiv 1910.03151) with the kernel sizes of its released weights, which its
formula does not give; GSoP-Net (arXiv 1811.12006) as its released code builds it. Both
start all BatchNorm weights at 1, so timm's ResNets come with `zero_init_last=False`.
"""

from __future__ import annotations

from typing import Any, cast

import timm
from timm.layers.eca import EcaModule
from timm.models import EfficientNet, ResNet, register_model
from timm.models._efficientnet_blocks import InvertedResidual
from torch import nn

from sovit.architectures.backbones import SecondOrderNet, second_order
from sovit.architectures.trunks import check_conv_size, unstride_last_stage
from sovit.attention import NUM_STAGES, REDUCED_DIM, add_gsop, stages_of
from sovit.networks.build import create, paper_cfg
from sovit.pooling import Pooling
from sovit.shapes import Number, Tensor

NARROW_CHS = 96


def add_eca(model: ResNet, *, kernel_sizes: tuple[int, ...]) -> None:
    """Insert ECA into every residual block of a ResNet, one kernel size per stage.

    As released, it sees the map after the last norm, before the sum with the shortcut.
    """
    odd = all(k >= 1 and k % 2 == 1 for k in kernel_sizes)
    if len(kernel_sizes) != NUM_STAGES or not odd:
        raise ValueError(
            "kernel_sizes: expected four odd numbers, one for each stage, got "
            f"{kernel_sizes}; the released ECA-ResNet-50 has (3, 5, 5, 7)"
        )
    for stage, kernel_size in zip(stages_of(model), kernel_sizes, strict=True):
        for block in stage:
            block.se = EcaModule(kernel_size=kernel_size)


def add_mobile_eca(model: EfficientNet) -> None:
    """Insert ECA at the end of every inverted residual block of a MobileNetV2.

    As released, it sees the block's narrow output, after the last norm and before the
    sum (timm's squeeze-and-excitation sits on the wide map before), also where there is
    no shortcut. Blocks of less than 96 channels have a kernel of 1, the others 3.
    """
    for stage in model.blocks:
        for block in cast(nn.Sequential, stage):
            wide = isinstance(block, InvertedResidual)
            norm = cast(nn.Module, block.bn3 if wide else block.bn2)
            num_chs = cast(Tensor, norm.weight).numel()
            # timm's norm carries the activation, which is none at a block's end.
            norm.act = EcaModule(kernel_size=1 if num_chs < NARROW_CHS else 3)


def _trunk(
    *,
    backbone: str,
    img_size: int | tuple[int, int] | None = None,
    pretrained_backbone: bool = False,
    **kwargs: Any,
) -> Any:
    if img_size is not None:
        check_conv_size(img_size)
    return timm.create_model(backbone, pretrained=pretrained_backbone, **kwargs)


def _eca_resnet(*, kernel_sizes: tuple[int, ...], **kwargs: Any) -> ResNet:
    model = _trunk(**kwargs)
    add_eca(model, kernel_sizes=tuple(kernel_sizes))
    return model


def _eca_mobilenet(**kwargs: Any) -> EfficientNet:
    model = _trunk(**kwargs)
    add_mobile_eca(model)
    return model


def _gsop_resnet(
    *,
    stages: tuple[int, ...],
    attention: str,
    reduced_dim: int = REDUCED_DIM,
    act: bool = False,
    divisor: str = "positions",
    drop_last_stride: bool = True,
    **kwargs: Any,
) -> ResNet:
    model = _trunk(**kwargs)
    if drop_last_stride:
        unstride_last_stage(model)
    add_gsop(
        model,
        stages=stages,
        attention=attention,
        reduced_dim=reduced_dim,
        act=act,
        divisor=divisor,
    )
    return model


def _gsop_net_2(
    *,
    pooling: Pooling,
    num_classes: int,
    fusion: str = "visual",
    drop_rate: Number = 0.0,
    **kwargs: Any,
) -> SecondOrderNet:
    return second_order(
        _gsop_resnet(**kwargs),
        pooling=pooling,
        num_classes=num_classes,
        fusion=fusion,
        drop_rate=drop_rate,
        drop_last_stride=False,
    )


def _eca_cfg(first_conv: str = "conv1", classifier: str = "fc") -> dict[str, Any]:
    return paper_cfg(
        title="ECA-Net: Efficient Channel Attention for Deep CNNs",
        ids="arXiv:1910.03151",
        origin="https://github.com/BangguWu/ECANet",
        first_conv=first_conv,
        classifier=classifier,
    )


def _gsop_cfg(first_conv: str, classifier: str) -> dict[str, Any]:
    return paper_cfg(
        title="Global Second-order Pooling Convolutional Networks",
        ids="arXiv:1811.12006",
        origin="https://github.com/ZilinGao/"
        "Global-Second-order-Pooling-Convolutional-Networks",
        first_conv=first_conv,
        classifier=classifier,
    )


default_cfgs = {
    **{f"eca_resnet{depth}": _eca_cfg() for depth in (18, 34, 50, 101, 152)},
    "eca_mobilenetv2": _eca_cfg("conv_stem", "classifier"),
    "gsop_resnet50_1": _gsop_cfg("conv1", "fc"),
    "gsop_resnet50_2": _gsop_cfg("backbone.conv1", "head.fc_visual"),
}


def _create_eca(
    depth: int, *, usual: tuple[int, ...], pretrained: bool, **kwargs: Any
) -> nn.Module:
    return create(
        _eca_resnet,
        name=f"eca_resnet{depth}",
        pretrained=pretrained,
        defaults={
            "backbone": f"resnet{depth}",
            "kernel_sizes": usual,
            "zero_init_last": False,
        },
        **kwargs,
    )


@register_model
def eca_resnet18(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Build ECA-ResNet-18, kernels of 3, 5, 7 and 7 as released."""
    return _create_eca(18, usual=(3, 5, 7, 7), pretrained=pretrained, **kwargs)


@register_model
def eca_resnet34(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Build ECA-ResNet-34, kernels of 3, 3, 5 and 7 as released."""
    return _create_eca(34, usual=(3, 3, 5, 7), pretrained=pretrained, **kwargs)


@register_model
def eca_resnet50(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Build ECA-ResNet-50, kernels of 3, 5, 5 and 7 as released.

    They add the paper's 80 parameters. Its formula gives (5, 5, 5, 7) for the widths of
    the blocks; the released code's default is 3 throughout: set `kernel_sizes`.
    """
    return _create_eca(50, usual=(3, 5, 5, 7), pretrained=pretrained, **kwargs)


@register_model
def eca_resnet101(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Build ECA-ResNet-101, kernels of 3, 3, 5 and 7 as released."""
    return _create_eca(101, usual=(3, 3, 5, 7), pretrained=pretrained, **kwargs)


@register_model
def eca_resnet152(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Build ECA-ResNet-152, kernels of 3, 3, 5 and 7 as released."""
    return _create_eca(152, usual=(3, 3, 5, 7), pretrained=pretrained, **kwargs)


@register_model
def eca_mobilenetv2(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Build ECA-MobileNetV2 as released, with dropout 0.25 before the classifier."""
    return create(
        _eca_mobilenet,
        name="eca_mobilenetv2",
        pretrained=pretrained,
        defaults={"backbone": "mobilenetv2_100", "drop_rate": 0.25},
        feature_indices=5,
        **kwargs,
    )


@register_model
def gsop_resnet50_1(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Build GSoP-Net1: a block at the end of every stage, average pooling at the end.

    The last stage has no stride. `attention` is "channel", "spatial", "avg", "max" or
    "concat", `reduced_dim` the blocks' width; `act` and `divisor` take the paper's text
    where the code differs.
    """
    return create(
        _gsop_resnet,
        name="gsop_resnet50_1",
        pretrained=pretrained,
        defaults={
            "backbone": "resnet50",
            "stages": (1, 2, 3, 4),
            "attention": "channel",
            "zero_init_last": False,
        },
        **kwargs,
    )


@register_model
def gsop_resnet50_2(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Build GSoP-Net2: blocks at the end of stages 1 to 3, iSQRT-COV of 256 at the end.

    Three Newton-Schulz iterations, as in its released code. Arguments are those of
    `gsop_resnet50_1`, and `pooling`.
    """
    return create(
        _gsop_net_2,
        name="gsop_resnet50_2",
        pretrained=pretrained,
        defaults={
            "backbone": "resnet50",
            "stages": (1, 2, 3),
            "attention": "channel",
            "pooling": Pooling.named("isqrt_cov", num_iterations=3),
            "zero_init_last": False,
        },
        feature_indices=5,
        **kwargs,
    )
