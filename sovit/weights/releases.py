"""The papers' released files: how to recognise them, and their names of our tensors."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from timm.layers.eca import EcaModule
from timm.models import VGG, EfficientNet, ResNet
from torch import nn

from sovit.architectures.backbones import SecondOrderNet
from sovit.architectures.vit import SoViT
from sovit.attention import Gsop
from sovit.shapes import Tensor

COUNTER = "num_batches_tracked"


@dataclass(frozen=True, kw_only=True)
class Release:
    """One kind of released file: its content, and its names of our tensors."""

    title: str
    """Content of such a file, for messages."""
    model: str
    """The model that takes it, for messages, and `example`, a name of one."""
    example: str
    rules: tuple[tuple[str, str], ...] = ()
    """Patterns in our tensors' names and what the file has instead, applied in order.
    Without rules layers go by their order."""
    classifier: tuple[tuple[str, str], ...] = ()
    """Our prefixes of the linear classifiers, and the file's."""
    triangle: str | None = None
    """Which triangle of the covariance its code vectorises unless told otherwise."""
    num_iterations: int | None = None
    """Newton-Schulz iterations of its code, which no tensor shows."""


_BACKBONE = (r"^backbone\.", "")
_REDUCTION = r"^head\.pool\.reduction\.0\."
_RESNET_HEAD = (
    (rf"{_REDUCTION}linear\.", "layer_reduce."),
    (rf"{_REDUCTION}norm\.", "layer_reduce_bn."),
    (r"^head\.fc_visual\.", "fc."),
    _BACKBONE,
)
_GSOP_BLOCK = (
    (r"\.se\.channel\.conv\.", ".conv_for_DR."),
    (r"\.se\.channel\.norm\.", ".bn_for_DR."),
    (r"\.se\.channel\.rows\.norm\.", ".row_bn."),
    (r"\.se\.channel\.rows\.conv_rows\.", ".row_conv_group."),
    (r"\.se\.channel\.rows\.fc\.", ".fc_adapt_channels."),
    (r"\.se\.spatial\.conv\.", ".conv_for_DR_spatial."),
    (r"\.se\.spatial\.norm\.", ".bn_for_DR_spatial."),
    (r"\.se\.spatial\.rows\.norm\.", ".row_bn_for_spatial."),
    (r"\.se\.spatial\.rows\.conv_rows\.", ".row_conv_group_for_spatial."),
    (r"\.se\.spatial\.rows\.fc\.", ".fc_adapt_channels_for_spatial."),
    (r"\.se\.fusion\.conv_channel\.", ".dilate_conv_for_concat1."),
    (r"\.se\.fusion\.conv_spatial\.", ".dilate_conv_for_concat2."),
    (r"\.se\.fusion\.norm\.", ".bn_for_concat."),
)

SO_VIT = Release(
    title="a network of the So-ViT or SoT release",
    model="a So-ViT or SoT model",
    example="so_vit_7",
    classifier=(
        ("head.fc_class.", "classifier.cls_fc."),
        ("head.fc_visual.", "classifier.visual_fc."),
    ),
)
COV_RESNET = Release(
    title="a ResNet with iSQRT-COV (fast-MPN-COV, or the optimisation study)",
    model="a ResNet with a covariance head",
    example="isqrt_resnet50",
    rules=_RESNET_HEAD,
    classifier=(("head.fc_visual.", "fc."),),
    triangle="upper",
    num_iterations=5,
)
COV_VGG = Release(
    title="a VGG with iSQRT-COV (fast-MPN-COV)",
    model="a VGG with a covariance head",
    example="isqrt_vgg16",
    rules=(
        (rf"{_REDUCTION}linear\.", "representation.conv_dr_block.0."),
        (rf"{_REDUCTION}norm\.", "representation.conv_dr_block.1."),
        (r"^hidden\.", "classifier."),
        (r"^head\.fc_visual\.", "classifier.6."),
        _BACKBONE,
    ),
    classifier=(("head.fc_visual.", "classifier.6."),),
    triangle="upper",
    num_iterations=5,
)
COV_MOBILENET = Release(
    title="a MobileNetV2 with iSQRT-COV (the optimisation study)",
    model="a MobileNetV2 with a covariance head",
    example="isqrt_mobilenetv2",
    triangle="upper",
    num_iterations=5,
)
GSOP_1 = Release(
    title="a GSoP-Net1 (mode 1)",
    model="a ResNet with GSoP blocks",
    example="gsop_resnet50_1",
    rules=_GSOP_BLOCK,
    classifier=(("fc.", "fc."),),
)
GSOP_2 = Release(
    title="a GSoP-Net2 (mode 2)",
    model="a ResNet with GSoP blocks and a covariance head",
    example="gsop_resnet50_2",
    rules=(*_GSOP_BLOCK, *_RESNET_HEAD),
    classifier=(("head.fc_visual.", "fc."),),
    triangle="lower",
    num_iterations=3,
)
ECA_RESNET = Release(
    title="an ECA-ResNet",
    model="a ResNet with ECA",
    example="eca_resnet50",
    rules=((r"\.se\.conv\.", ".eca.conv."),),
    classifier=(("fc.", "fc."),),
)
ECA_MOBILENET = Release(
    title="an ECA-MobileNetV2",
    model="a MobileNetV2 with ECA",
    example="eca_mobilenetv2",
)
RELEASES = (
    SO_VIT,
    COV_RESNET,
    COV_VGG,
    COV_MOBILENET,
    GSOP_1,
    GSOP_2,
    ECA_RESNET,
    ECA_MOBILENET,
)


def plain_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Remove "module.", which DataParallel also leaves in the middle of names."""
    return {re.sub(r"(^|\.)module\.", r"\1", n): w for n, w in weights.items()}


def recognise(weights: Mapping[str, Tensor]) -> Release | None:
    """Recognise a file's release by its tensors' names; None for others."""

    def has(pattern: str) -> bool:
        return any(re.search(pattern, name) for name in weights)

    if has(r"^visual_tokens\."):
        return SO_VIT
    if has(r"^features\.\d+\.conv\.\d"):
        return _recognise_mobilenet(weights)
    if has(r"\.(conv_for_DR|conv_for_DR_spatial)\."):
        return GSOP_2 if has(r"^layer_reduce\.") else GSOP_1
    if has(r"^layer_reduce\."):
        return COV_RESNET
    if has(r"^representation\.conv_dr_block\."):
        return COV_VGG
    return ECA_RESNET if has(r"\.eca\.conv\.weight$") else None


def _recognise_mobilenet(weights: Mapping[str, Tensor]) -> Release | None:
    """Recognise MobileNets by ECA's kernels, (1, 1, k), or a triangle's classifier."""
    if any(w.ndim == 3 for n, w in weights.items() if n.startswith("features.")):
        return ECA_MOBILENET
    wide = [w for w in weights.values() if w.ndim == 2]
    is_cov = any(side_of_triangle(weight.shape[1]) for weight in wide)
    return COV_MOBILENET if is_cov else None


def release_of(model: nn.Module) -> Release | None:
    """Return the release whose files a model takes; None for other models."""
    if isinstance(model, SoViT):
        return SO_VIT
    trunk = model.backbone if isinstance(model, SecondOrderNet) else model
    has_gsop = any(isinstance(module, Gsop) for module in trunk.modules())
    if isinstance(model, SecondOrderNet):
        if isinstance(trunk, ResNet):
            return GSOP_2 if has_gsop else COV_RESNET
        if isinstance(trunk, VGG):
            return COV_VGG
        return COV_MOBILENET if isinstance(trunk, EfficientNet) else None
    has_eca = any(isinstance(module, EcaModule) for module in trunk.modules())
    if isinstance(model, ResNet) and has_gsop:
        return GSOP_1
    if isinstance(model, ResNet) and has_eca:
        return ECA_RESNET
    return ECA_MOBILENET if isinstance(model, EfficientNet) and has_eca else None


def side_of_triangle(num_values: int) -> int | None:
    """Return the side of the symmetric matrix whose triangle has that many values."""
    side = (math.isqrt(8 * num_values + 1) - 1) // 2
    return side if side and side * (side + 1) // 2 == num_values else None


@dataclass(frozen=True, kw_only=True)
class Names:
    """The file's names of a model's tensors."""

    parts: dict[str, tuple[str, ...]]
    """For each of our tensors, those of the file that it is made of."""
    classifier: tuple[tuple[str, str], ...]
    """Our prefixes of the linear classifiers, and the file's."""


def names_by_rules(release: Release, own: Iterable[str]) -> Names:
    """Map our tensors to a file's names by the release's rules."""
    parts = {}
    for name in own:
        theirs = name
        for pattern, replacement in release.rules:
            theirs = re.sub(pattern, replacement, theirs)
        parts[name] = (theirs,)
    return Names(parts=parts, classifier=release.classifier)


def names_by_order(
    model: nn.Module, own: Iterable[str], weights: Mapping[str, Tensor]
) -> Names:
    """Map a MobileNetV2's tensors to a file's names, layer by layer.

    Torchvision numbers the layers of a block, timm names them; both have the same ones
    in the same order. Raises ValueError where there are more in one of them.
    """
    ours, theirs = _layers(own), _layers(weights)
    theirs = sorted(theirs, key=lambda layer: _place(layer, weights=weights))
    prefix = "head.fc_visual" if isinstance(model, SecondOrderNet) else "classifier"
    ours = [layer for layer in ours if layer != prefix]
    heads = [layer for layer in theirs if _is_classifier(layer)]
    theirs = [layer for layer in theirs if not _is_classifier(layer)]
    if len(ours) != len(theirs) or len(heads) > 1:
        raise ValueError(
            f"expected a file of a MobileNetV2 with {len(ours)} layers before one "
            f"classifier, got one with {len(theirs)} before {len(heads)}; create the "
            "model that the weights were trained as"
        )
    found = dict(zip(ours, theirs, strict=True)) | {
        prefix: (heads or ["classifier"])[0]
    }
    parts = {}
    for name in own:
        layer, kind = name.rsplit(".", 1)
        parts[name] = (f"{found[layer]}.{kind}",)
    return Names(parts=parts, classifier=((f"{prefix}.", f"{found[prefix]}."),))


def _layers(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(name.rsplit(".", 1)[0] for name in names))


def _is_classifier(layer: str) -> bool:
    return layer.split(".")[0] in ("classifier", "fc")


def _place(layer: str, *, weights: Mapping[str, Tensor]) -> tuple[Any, ...]:
    """Return where a layer stands: features, then the reduction, then the classifier.

    By the numbers in its name, since not every kind of file keeps tensors in order. A
    reduction may be named by words: its convolution stands before its norm.
    """
    numbers = tuple(
        (part.isdigit(), int(part) if part.isdigit() else part)
        for part in layer.split(".")
    )
    if layer.startswith("features."):
        return 0, numbers
    weight = weights.get(f"{layer}.weight")
    is_norm = weight is not None and weight.ndim == 1
    return 1 + _is_classifier(layer), is_norm, numbers


_DEPTHS: Mapping[tuple[bool, tuple[int, ...]], str] = {
    (False, (2, 2, 2, 2)): "ResNet-18",
    (False, (3, 4, 6, 3)): "ResNet-34",
    (True, (3, 4, 6, 3)): "ResNet-50",
    (True, (3, 4, 23, 3)): "ResNet-101",
    (True, (3, 8, 36, 3)): "ResNet-152",
}


def read_settings(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Infer a network's settings from the shapes of a release's tensors."""
    found: dict[str, Any] = {}
    blocks, kernels = dict[str, int](), dict[str, int]()
    for name, shape in shapes.items():
        if block := re.match(r"layer(\d)\.(\d+)\.", name):
            blocks[block[1]] = max(blocks.get(block[1], 0), int(block[2]) + 1)
            if name.endswith(".eca.conv.weight"):
                kernels[block[1]] = shape[-1]
        if re.search(r"\.conv_for_DR(_spatial)?\.weight$", name):
            found["reduced_dim"] = shape[0]
        if re.fullmatch(r"(layer_reduce|representation.conv_dr_block.0).weight", name):
            found["pooling['reduced_dim']"] = shape[0]
    if blocks:
        counts = tuple(count for _, count in sorted(blocks.items()))
        kind = ("layer1.0.conv3.weight" in shapes, counts)
        found["network"] = _DEPTHS.get(kind, f"blocks {counts}")
    if kernels:
        found["kernel_sizes"] = tuple(size for _, size in sorted(kernels.items()))
    if attention := _attention(shapes):
        found["attention"] = attention
    return found


def _attention(names: Iterable[str]) -> str | None:
    text = " ".join(names)
    if ".bn_for_concat." in text:
        return "concat"
    channel, spatial = ".conv_for_DR." in text, ".conv_for_DR_spatial." in text
    if channel and spatial:
        return "avg or max"
    return "channel" if channel else "spatial" if spatial else None
