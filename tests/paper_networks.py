"""The papers' networks for tests: their tables' figures, quick ways to make them."""

from __future__ import annotations

import functools
from typing import Any

import timm
import torch
from torch import Tensor, nn

# Parameters in millions, counted from the released code's layers; for DeiT and Swin the
# count of the settings that come nearest to the printed 7.0, 94.9, 31.6 and 95.9.
MILLIONS = {
    "mpncov_resnet50": 56.93,
    "mpncov_resnet101": 75.92,
    "isqrt_resnet18": 44.21,
    "isqrt_resnet18_128": 19.50,
    "isqrt_resnet18_64": 13.29,
    "isqrt_resnet34": 54.31,
    "isqrt_resnet34_128": 29.61,
    "isqrt_resnet34_64": 23.40,
    "isqrt_resnet50": 56.93,
    "isqrt_resnet50_128": 32.03,
    "isqrt_resnet50_64": 25.72,
    "isqrt_resnet101": 75.92,
    "isqrt_resnet101_128": 51.02,
    "isqrt_resnet101_64": 44.71,
    "isqrt_vgg16": 170.48,
    "isqrt_mobilenetv2": 35.45,
    "gaussian_resnet50": 57.19,
    "gsop_resnet50_1": 28.29,
    "gsop_resnet50_2": 58.28,
    "deit_tiny_so": 7.05,
    "deit_base_so": 94.88,
    "swin_tiny_so": 31.45,
    "swin_base_so": 95.67,
}
# ECA's paper counts in units of 2^20, to two or three places.
ECA_MEBI = {
    "eca_resnet18": 11.148,
    "eca_resnet34": 20.788,
    "eca_resnet50": 24.37,
    "eca_resnet101": 42.49,
    "eca_resnet152": 57.40,
    "eca_mobilenetv2": 3.34,
}
ECA_KERNELS = {
    "eca_resnet18": (3, 5, 7, 7),
    "eca_resnet34": (3, 3, 5, 7),
    "eca_resnet50": (3, 5, 5, 7),
    "eca_resnet101": (3, 3, 5, 7),
    "eca_resnet152": (3, 3, 5, 7),
}
NAMES = (*MILLIONS, *ECA_MEBI)
# Drawing these weights takes seconds: shapes alone run.
BIG = (
    *(name for name in NAMES if "101" in name or "152" in name),
    *("isqrt_vgg16", "deit_base_so", "swin_base_so"),
    *("isqrt_resnet18", "isqrt_resnet34", "isqrt_resnet34_128"),
)
ON_META = tuple(name for name in NAMES if name in BIG)


def images(*, num_images: int = 2, size: int = 64) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(num_images, 3, size, size, generator=generator)


def build(name: str, **kwargs: Any) -> nn.Module:
    return timm.create_model(name, num_classes=3, img_size=64, **kwargs)


def on_meta(name: str, **kwargs: Any) -> Any:
    """Build a model on the meta device."""
    with torch.device("meta"):
        return timm.create_model(name, **kwargs)


@functools.cache
def usual(name: str) -> Any:
    """Build a default model on the meta device, shared by tests."""
    return on_meta(name)
