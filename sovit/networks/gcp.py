"""Networks of global covariance pooling by name: `timm.create_model("isqrt_resnet50")`.

MPN-COV (arXiv 1703.08050), iSQRT-COV (arXiv 1712.01034), the Gaussian embedding (arXiv
1904.06836) and the nets of the optimisation study (arXiv 2003.11241), as their PyTorch
releases build them: the last stage without stride, a 1x1 reduction without bias (the
MatConvNet releases have one), BatchNorm weights that start at 1. `pooling` changes the
head ("progressive_dims" and "num_groups" are the journal version's compressions), and
`drop_last_stride=False` keeps the backbone's stride.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from timm.models import register_model
from torch import nn

from sovit.architectures.backbones import second_order
from sovit.networks.build import create, paper_cfg
from sovit.pooling import Pooling

_CLASSIFIER = "head.fc_visual"
_MPN_DEPTHS, _ISQRT_DEPTHS = (50, 101), (18, 34, 50, 101)
_ISQRT_DIMS: Mapping[str, int] = MappingProxyType({"": 256, "_128": 128, "_64": 64})
_MPN_COV = {
    "title": "Is Second-order Information Helpful for Large-scale Visual Recognition?",
    "ids": "arXiv:1703.08050",
    "origin": "https://github.com/jiangtaoxie/MPN-COV",
}
_ISQRT_COV = {
    "title": "Towards Faster Training of Global Covariance Pooling Networks by "
    "Iterative Matrix Square Root Normalization",
    "ids": "arXiv:1712.01034",
    "origin": "https://github.com/jiangtaoxie/fast-MPN-COV",
}
_GAUSSIAN = {
    "title": "Deep CNNs Meet Global Covariance Pooling: Better Representation and "
    "Generalization",
    "ids": "arXiv:1904.06836",
    "origin": "",
}
_OPTIMIZATION = {
    "title": "What Deep CNNs Benefit from Global Covariance Pooling: An Optimization "
    "Perspective",
    "ids": "arXiv:2003.11241",
    "origin": "https://github.com/ZhangLi-CS/GCP_Optimization",
}


def _cfg(paper: dict[str, str], first_conv: str = "conv1") -> dict[str, Any]:
    return paper_cfg(
        **paper, first_conv=f"backbone.{first_conv}", classifier=_CLASSIFIER
    )


default_cfgs = {
    **{f"mpncov_resnet{depth}": _cfg(_MPN_COV) for depth in _MPN_DEPTHS},
    **{
        f"isqrt_resnet{depth}{width}": _cfg(_ISQRT_COV)
        for depth in _ISQRT_DEPTHS
        for width in _ISQRT_DIMS
    },
    "isqrt_vgg16": _cfg(_ISQRT_COV, "features.0"),
    "isqrt_mobilenetv2": _cfg(_OPTIMIZATION, "conv_stem"),
    "gaussian_resnet50": _cfg(_GAUSSIAN),
}


def _resnet(
    name: str, *, depth: int, usual: Pooling, pretrained: bool, **kwargs: Any
) -> nn.Module:
    return create(
        second_order,
        name=name,
        pretrained=pretrained,
        defaults={
            "backbone": f"resnet{depth}",
            "pooling": usual,
            "fusion": "visual",
            "drop_last_stride": True,
            "zero_init_last": False,
        },
        feature_indices=5,
        **kwargs,
    )


def _register(name: str, *, depth: int, usual: Pooling, text: str) -> None:
    """Register a head on a ResNet, of which a paper has the same at many depths."""

    def build(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return _resnet(name, depth=depth, usual=usual, pretrained=pretrained, **kwargs)

    build.__name__, build.__doc__ = name, f"Build {text}."
    register_model(build)


for _depth in _MPN_DEPTHS:
    _register(
        f"mpncov_resnet{_depth}",
        depth=_depth,
        usual=Pooling.named("mpn_cov"),
        text=f"MPN-COV on ResNet-{_depth}: covariance of 256, root by eigenvalues",
    )
for _depth, (_width, _dim) in itertools.product(_ISQRT_DEPTHS, _ISQRT_DIMS.items()):
    _register(
        f"isqrt_resnet{_depth}{_width}",
        depth=_depth,
        usual=Pooling.named("isqrt_cov", reduced_dim=_dim),
        text=f"iSQRT-COV on ResNet-{_depth}, covariance of {_dim} channels",
    )


@register_model
def isqrt_vgg16(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Build iSQRT-COV on VGG-16 with BatchNorm, without its last pooling.

    Two layers of 4096 with dropout 0.5 precede the classifier, as released: 170,479,144
    parameters and 8,960 BatchNorm statistics make 650.4 MiB, the size of its file.
    """
    return create(
        second_order,
        name="isqrt_vgg16",
        pretrained=pretrained,
        defaults={
            "backbone": "vgg16_bn",
            "pooling": Pooling.named("isqrt_cov"),
            "fusion": "visual",
            "hidden_dims": (4096, 4096),
            "drop_rate": 0.5,
        },
        feature_indices=5,
        **kwargs,
    )


@register_model
def isqrt_mobilenetv2(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Build iSQRT-COV on MobileNetV2, which keeps its stride: 7x7 positions.

    As released: the last convolution's 1280 channels reduced to 256, with ReLU6, and
    dropout 0.2 before the classifier.
    """
    return create(
        second_order,
        name="isqrt_mobilenetv2",
        pretrained=pretrained,
        defaults={
            "backbone": "mobilenetv2_100",
            "pooling": Pooling.named("isqrt_cov", act_layer="relu6"),
            "fusion": "visual",
            "drop_rate": 0.2,
        },
        feature_indices=5,
        **kwargs,
    )


@register_model
def gaussian_resnet50(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Build the Gaussian embedding on ResNet-50: mean and covariance of 256 channels.

    The square root of the 257x257 embedding by five Newton-Schulz iterations.
    """
    return _resnet(
        "gaussian_resnet50",
        depth=50,
        usual=Pooling.named("gaussian"),
        pretrained=pretrained,
        **kwargs,
    )
