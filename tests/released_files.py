"""Build files as the papers' authors wrote them: names, wrappers, fixed images."""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Mapping
from typing import Any

import timm
import torch
from torch import Tensor, nn

from tests.test_official import filled, golden, noise

RESNET = {
    "head.pool.reduction.0.linear.": "layer_reduce.",
    "head.pool.reduction.0.norm.": "layer_reduce_bn.",
    "head.fc_visual.": "fc.",
    "backbone.": "",
}
VGG = {
    "head.pool.reduction.0.linear.": "representation.conv_dr_block.0.",
    "head.pool.reduction.0.norm.": "representation.conv_dr_block.1.",
    "hidden.": "classifier.",
    "head.fc_visual.": "classifier.6.",
    "backbone.features.": "features.module.",
}
ECA = {".se.conv.": ".eca.conv."}
# In the order of replacement: of one that another begins with, the longer first.
GSOP = {
    ".se.channel.rows.norm.": ".row_bn.",
    ".se.channel.rows.conv_rows.": ".row_conv_group.",
    ".se.channel.rows.fc.": ".fc_adapt_channels.",
    ".se.channel.conv.": ".conv_for_DR.",
    ".se.channel.norm.": ".bn_for_DR.",
    ".se.spatial.rows.norm.": ".row_bn_for_spatial.",
    ".se.spatial.rows.conv_rows.": ".row_conv_group_for_spatial.",
    ".se.spatial.rows.fc.": ".fc_adapt_channels_for_spatial.",
    ".se.spatial.conv.": ".conv_for_DR_spatial.",
    ".se.spatial.norm.": ".bn_for_DR_spatial.",
    ".se.fusion.conv_channel.": ".dilate_conv_for_concat1.",
    ".se.fusion.conv_spatial.": ".dilate_conv_for_concat2.",
    ".se.fusion.norm.": ".bn_for_concat.",
}


def as_authors(own: Mapping[str, Tensor], rules: Mapping[str, str]) -> dict[str, Any]:
    """Rename our tensors as the authors; linear maps before a norm become 1x1 kernels.

    A classifier of a triangle keeps our order of its columns, the upper one's.
    """
    found = {}
    for name, tensor in own.items():
        theirs = name
        for ours, other in rules.items():
            theirs = theirs.replace(ours, other)
        is_conv = "reduction.0.linear" in name
        found[theirs] = tensor[..., None, None] if is_conv else tensor
    return found


def in_lower_order(weight: Tensor, *, side: int) -> Tensor:
    """Reorder columns from the upper triangle row by row to the lower row by row."""
    places = torch.zeros(side, side, dtype=torch.long)
    rows, columns = torch.triu_indices(side, side)
    places[rows, columns] = places[columns, rows] = torch.arange(len(rows))
    lower = [places[i, j] for i in range(side) for j in range(i + 1)]
    return weight[:, torch.stack(lower)]


def as_pytorch_0_4(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Drop BatchNorm's counters, which came with PyTorch 0.4.1."""
    return {n: w for n, w in weights.items() if not n.endswith("num_batches_tracked")}


def mobilenet_layer(name: str) -> tuple[int, ...]:
    """Parse the numbers in a name of torchvision's MobileNetV2."""
    return tuple(int(number) for number in re.findall(r"\d+", name))


@functools.cache
def golden_weights(name: str) -> dict[str, Tensor]:
    """Return the fixed weights of an authors' network, shared by tests."""
    return {key: filled(key, shape=shape) for key, shape in golden(name)["tensors"]}


def golden_images(name: str) -> Tensor:
    """Return the two fixed images that an authors' network was asked about."""
    side = golden(name)["image_size"] // 8
    values = 1.5 * noise("image", num_values=2 * 3 * side * side)
    image = torch.tensor(values.reshape(2, 3, side, side), dtype=torch.float32)
    return image.repeat_interleave(8, 2).repeat_interleave(8, 3)


def net(name: str = "isqrt_resnet18_64", *, seed: int = 0, **kwargs: Any) -> Any:
    """Build a narrow network with random statistics, including counters."""
    torch.manual_seed(seed)
    settings = {"num_classes": 3, **kwargs}
    model = timm.create_model(name, **settings)
    for key, value in model.state_dict().items():
        if key.endswith("num_batches_tracked"):
            value.fill_(5 + seed)
        elif "running_" in key:
            value.uniform_(0.5, 1.5)
    return model.eval()


@functools.cache
def _pair() -> tuple[Any, Any]:
    return net(), net(seed=1)


def pair() -> tuple[Any, Any]:
    """Return two networks with different weights, built once."""
    source, model = _pair()
    return source, copy.deepcopy(model)


def same(model: nn.Module, source: nn.Module) -> bool:
    """Check whether two networks have equal tensors."""
    own, other = model.state_dict(), source.state_dict()
    return own.keys() == other.keys() and all(
        torch.equal(own[name], other[name]) for name in own
    )
