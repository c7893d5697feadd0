"""Token embeddings: an image becomes a sequence of visual tokens, one for 16x16 pixels.

So-ViT (arXiv 2104.10935) cuts no patches: a small convolutional network with three
stages makes the tokens. Every embedding here returns (B, H/16 * W/16, embed_dim).
"""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
from timm.models.resnet import Bottleneck
from torch import nn

from sovit.shapes import Float, Tensor

STRIDE = 16
MIN_SIZE = 32
STEM_DIM = 64
NUM_STAGES = 3
DENSE_LAYERS = 6
DENSE_GROWTH = 16
DENSE_BOTTLENECK = 2
DENSE_OUT = 128


def check_img_size(img_size: int | tuple[int, int]) -> tuple[int, int]:
    """Return (height, width) of images that the models take, or raise ValueError."""
    size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
    if len(size) != 2 or any(side < MIN_SIZE or side % STRIDE for side in size):
        raise ValueError(
            f"img_size must be a multiple of {STRIDE} from {MIN_SIZE} up, or a pair "
            f"(height, width) of such, got {img_size}: resize or crop the images, for "
            "example to 224."
        )
    return size[0], size[1]


class DenseLayer(nn.Module):
    """Grow a map by 16 channels: ReLU, 1x1, ReLU, 3x3, without normalisation.

    The release means to normalise, but the library version it pins gives the layer
    a plain ReLU for its norm. Its weights have no such norm, so neither has this.
    """

    def __init__(self, in_chs: int) -> None:
        super().__init__()
        mid_chs = DENSE_BOTTLENECK * DENSE_GROWTH
        self.conv1 = nn.Conv2d(in_chs, mid_chs, 1, bias=False)
        self.conv2 = nn.Conv2d(mid_chs, DENSE_GROWTH, 3, padding=1, bias=False)

    def forward(self, active: Float[Tensor, "b c h w"]) -> Float[Tensor, "b g h w"]:
        """Map features that have been through their ReLU to the new channels."""
        return self.conv2(self.conv1(active).relu())


class DenseStage(nn.Module):
    """Halve the sides of a map by a dense block and a transition.

    The transition is BatchNorm without an activation (the same slip of the release),
    pooling and a 1x1 convolution. The papers pool after the convolution; both are
    linear and commute, and this order needs a quarter of the products.
    """

    def __init__(self, in_chs: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            DenseLayer(in_chs + i * DENSE_GROWTH) for i in range(DENSE_LAYERS)
        )
        width = in_chs + DENSE_LAYERS * DENSE_GROWTH
        self.norm = nn.BatchNorm2d(width)
        self.pool = nn.AvgPool2d(2)
        self.conv = nn.Conv2d(width, DENSE_OUT, 1, bias=False)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h2 w2"]:
        """Concatenate every layer's channels, then halve height and width."""
        features, active = [x], [x.relu()]
        for layer in self.layers:
            features.append(layer(torch.cat(active, 1)))
            active.append(features[-1].relu())
        return self.conv(self.pool(self.norm(torch.cat(features, 1))))


def _bottleneck(in_chs: int) -> Bottleneck:
    """Build a residual stage of stride 2, its shortcut a strided 1x1 convolution."""
    out_chs = STEM_DIM * Bottleneck.expansion
    shortcut = nn.Sequential(
        nn.Conv2d(in_chs, out_chs, 1, stride=2, bias=False), nn.BatchNorm2d(out_chs)
    )
    norm = partial(nn.BatchNorm2d, eps=1e-3, momentum=0.01)
    return Bottleneck(
        in_chs,
        STEM_DIM,
        stride=2,
        downsample=shortcut,
        norm_layer=norm,  # pyright: ignore[reportArgumentType]
    )


class ConvEmbed(nn.Module):
    """Embed an image by a stem, three halving stages and a 1x1 projection.

    The stem is a 3x3 convolution with bias and neither norm nor activation, and a
    max-pooling of stride 2. "resnet" stages are bottlenecks (So-ViT), "densenet" stages
    dense blocks (SoT).
    """

    def __init__(
        self,
        embed_dim: int,
        *,
        kind: Literal["resnet", "densenet"] = "resnet",
        in_chans: int = 3,
    ) -> None:
        super().__init__()
        self.stem = nn.Conv2d(in_chans, STEM_DIM, 3, padding=1)
        self.pool = nn.MaxPool2d(3, stride=2, padding=1)
        if kind == "resnet":
            width, stage = STEM_DIM * Bottleneck.expansion, _bottleneck
        else:
            width, stage = DENSE_OUT, DenseStage
        in_chs = [STEM_DIM] + [width] * (NUM_STAGES - 1)
        self.stages = nn.Sequential(*(stage(chs) for chs in in_chs))
        self.proj = nn.Conv2d(width, embed_dim, 1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
        """Turn images (B, C, H, W) into tokens (B, H/16 * W/16, D), row by row."""
        x = self.proj(self.stages(self.pool(self.stem(x))))
        return x.flatten(2).mT


class LinearEmbed(nn.Module):
    """Embed an image by one linear map of its 16x16 patches, as ViT does."""

    def __init__(self, embed_dim: int, *, in_chans: int = 3) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, STRIDE, stride=STRIDE)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
        """Turn images (B, C, H, W) into tokens (B, H/16 * W/16, D), row by row."""
        return self.proj(x).flatten(2).mT


def build_token_embed(
    kind: str, *, embed_dim: int, in_chans: int = 3
) -> ConvEmbed | LinearEmbed:
    """Build a token embedding by its name, or raise ValueError."""
    if kind == "resnet" or kind == "densenet":
        return ConvEmbed(embed_dim, kind=kind, in_chans=in_chans)
    if kind == "linear":
        return LinearEmbed(embed_dim, in_chans=in_chans)
    raise ValueError(
        f"token_embed must be 'resnet', 'densenet' or 'linear', got {kind!r}: "
        "choose one of these."
    )
