"""Token embeddings: an image becomes a sequence of visual tokens.

So-ViT (arXiv 2104.10935) cuts no patches: a small convolutional network with three
stages makes the tokens, one for 16x16 pixels. With s as `token_stride` every embedding
here returns (B, H/s * W/s, embed_dim): a covariance needs many tokens, which small
images have at stride 8 or 4 only.
"""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
from timm.models.resnet import Bottleneck
from torch import nn

from sovit.shapes import Float, Tensor

TOKEN_STRIDES = (16, 8, 4)
"""Pixels of an image's side for each token: the papers' first."""
TOKEN_STRIDE = TOKEN_STRIDES[0]
# The fewest tokens along a side that any embedding is asked for.
MIN_GRID = 2
STEM_DIM = 64
STEM_STRIDE = 2
NUM_STAGES = 3
DENSE_LAYERS = 6
DENSE_GROWTH = 16
DENSE_BOTTLENECK = 2
DENSE_OUT = 128


def check_token_stride(token_stride: int) -> int:
    """Return the stride, or raise ValueError where no embedding has it."""
    if token_stride not in TOKEN_STRIDES:
        raise ValueError(
            f"token_stride: expected one of {TOKEN_STRIDES}, got {token_stride!r}; 16 "
            "is the papers', 8 and 4 are for small images"
        )
    return token_stride


def check_img_size(
    img_size: int | tuple[int, int], *, token_stride: int = TOKEN_STRIDE
) -> tuple[int, int]:
    """Return (height, width) of images that the models take, or raise ValueError."""
    size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
    if not _fits(size, token_stride):
        others = [one for one in TOKEN_STRIDES if _fits(size, one)]
        hint = f", or set token_stride={others[0]}" if others else ""
        raise ValueError(
            f"img_size: expected a multiple of {token_stride} from "
            f"{MIN_GRID * token_stride} up, or a pair (height, width) of such, got "
            f"{img_size}; resize or crop the images, for example to 224{hint}"
        )
    return size[0], size[1]


def _fits(size: tuple[int, ...], token_stride: int) -> bool:
    smallest = MIN_GRID * token_stride
    return len(size) == 2 and all(
        side >= smallest and side % token_stride == 0 for side in size
    )


class DenseLayer(nn.Module):
    """Dense layer of 16 new channels: ReLU, 1x1, ReLU, 3x3, without normalisation.

    The release means to normalise, but the library version it pins gives the layer
    a plain ReLU for its norm. Its weights have no such norm, so neither has this.
    """

    def __init__(self, in_chs: int) -> None:
        super().__init__()
        mid_chs = DENSE_BOTTLENECK * DENSE_GROWTH
        self.conv1 = nn.Conv2d(in_chs, mid_chs, 1, bias=False)
        self.conv2 = nn.Conv2d(mid_chs, DENSE_GROWTH, 3, padding=1, bias=False)

    def forward(self, active: Float[Tensor, "b c h w"]) -> Float[Tensor, "b g h w"]:
        """Compute the new channels of features that have been through their ReLU."""
        return self.conv2(self.conv1(active).relu())


class DenseStage(nn.Module):
    """Dense block and transition that halve the sides of a map, or keep them.

    The transition is BatchNorm without an activation (the same slip of the release),
    pooling and a 1x1 convolution. The papers pool after the convolution; both are
    linear and commute, and this order needs a quarter of the products.
    """

    def __init__(self, in_chs: int, *, stride: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            DenseLayer(in_chs + i * DENSE_GROWTH) for i in range(DENSE_LAYERS)
        )
        width = in_chs + DENSE_LAYERS * DENSE_GROWTH
        self.norm = nn.BatchNorm2d(width)
        self.pool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.conv = nn.Conv2d(width, DENSE_OUT, 1, bias=False)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h2 w2"]:
        """Concatenate every layer's channels, then divide height and width."""
        features, active = [x], [x.relu()]
        for layer in self.layers:
            features.append(layer(torch.cat(active, 1)))
            active.append(features[-1].relu())
        return self.conv(self.pool(self.norm(torch.cat(features, 1))))


def _bottleneck(in_chs: int, *, stride: int = 2) -> Bottleneck:
    """Build a residual stage; its shortcut is a 1x1 convolution at every stride."""
    out_chs = STEM_DIM * Bottleneck.expansion
    shortcut = nn.Sequential(
        nn.Conv2d(in_chs, out_chs, 1, stride=stride, bias=False),
        nn.BatchNorm2d(out_chs),
    )
    norm = partial(nn.BatchNorm2d, eps=1e-3, momentum=0.01)
    return Bottleneck(
        in_chs,
        STEM_DIM,
        stride=stride,
        downsample=shortcut,
        norm_layer=norm,  # pyright: ignore[reportArgumentType]
    )


class ConvEmbed(nn.Module):
    """Convolutional embedding of an image: stem, three stages and 1x1 projection.

    The stem is a 3x3 convolution with bias and neither norm nor activation, and a
    max-pooling of stride 2. "resnet" stages are bottlenecks (So-ViT), "densenet" stages
    dense blocks (SoT). All stages halve the map at `token_stride` 16; at 8 the last one
    keeps it, at 4 the last two, as SoT has it for Swin. The weights are of the same
    shapes. Without `flatten` the tokens stay a map, as a timm embedding's `proj` gives.
    """

    def __init__(
        self,
        embed_dim: int,
        *,
        kind: Literal["resnet", "densenet"] = "resnet",
        in_chans: int = 3,
        token_stride: int = TOKEN_STRIDE,
        flatten: bool = True,
    ) -> None:
        super().__init__()
        check_token_stride(token_stride)
        self.flatten = flatten
        self.stem = nn.Conv2d(in_chans, STEM_DIM, 3, padding=1)
        self.pool = nn.MaxPool2d(3, stride=STEM_STRIDE, padding=1)
        if kind == "resnet":
            width, stage = STEM_DIM * Bottleneck.expansion, _bottleneck
        else:
            width, stage = DENSE_OUT, DenseStage
        in_chs = [STEM_DIM] + [width] * (NUM_STAGES - 1)
        # Stage i still halves where a token is larger than what came before it.
        strides = [
            2 if STEM_STRIDE * 2**i < token_stride else 1 for i in range(NUM_STAGES)
        ]
        self.stages = nn.Sequential(
            *(stage(chs, stride=s) for chs, s in zip(in_chs, strides, strict=True))
        )
        self.proj = nn.Conv2d(width, embed_dim, 1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b ..."]:
        """Embed images (B, C, H, W) as tokens (B, N, D), row by row, or as a map."""
        x = self.proj(self.stages(self.pool(self.stem(x))))
        return x.flatten(2).mT if self.flatten else x


class LinearEmbed(nn.Module):
    """Linear embedding of an image's patches, as in ViT."""

    def __init__(
        self, embed_dim: int, *, in_chans: int = 3, token_stride: int = TOKEN_STRIDE
    ) -> None:
        super().__init__()
        side = check_token_stride(token_stride)
        self.proj = nn.Conv2d(in_chans, embed_dim, side, stride=side)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
        """Embed images (B, C, H, W) as tokens (B, N, D), row by row."""
        return self.proj(x).flatten(2).mT


def build_token_embed(
    kind: str,
    *,
    embed_dim: int,
    in_chans: int = 3,
    token_stride: int = TOKEN_STRIDE,
) -> ConvEmbed | LinearEmbed:
    """Build a token embedding by its name, or raise ValueError."""
    if kind == "resnet" or kind == "densenet":
        return ConvEmbed(
            embed_dim, kind=kind, in_chans=in_chans, token_stride=token_stride
        )
    if kind == "linear":
        return LinearEmbed(embed_dim, in_chans=in_chans, token_stride=token_stride)
    raise ValueError(
        f"token_embed: expected 'resnet', 'densenet' or 'linear', got {kind!r}; choose "
        "one of these"
    )
