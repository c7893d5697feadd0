"""GSoP blocks: attention inside a network that reads a map's covariance.

Global Second-order Pooling (arXiv 1811.12006) gates the channels or the positions of a
map by how they vary together. A block comes after the last norm of a residual block and
before the sum: the place that timm's ResNet keeps for attention, `block.se`.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from timm.models.resnet import ResNet
from torch import nn
from torch.nn import functional as F

from sovit.moments import covariance
from sovit.precision import at_least_float32, autocast_off, matmul
from sovit.shapes import Float, Tensor

# Calls in a graph of torch.fx, which sees neither shapes nor devices.
for _name in ("covariance", "spatial_covariance"):
    torch.fx.wrap(_name)

ATTENTIONS = ("channel", "spatial", "avg", "max", "concat")
DIVISORS = ("positions", "channels")

REDUCED_DIM = 128
ROW_MULTIPLIER = 4
GRID_SIZE = 8
CONCAT_GROUP_CHS = 64
CONCAT_BASE_GROUPS = 32
NUM_STAGES = 4


def spatial_covariance(
    x: Float[Tensor, "b c n"], *, divisor: str = "positions"
) -> Float[Tensor, "b n n"]:
    """Compute how positions vary together over the channels, (B, N, N).

    With "channels" it is their covariance, E[x_i x_j] - E[x_i] E[x_j]. GSoP's release
    divides the sums over channels by the number of positions instead, which gives
    r E[x_i x_j] - r^2 E[x_i] E[x_j] with r = c / N: "positions" is that. The two are
    the same where c = N. In float32 at least.
    """
    if divisor not in DIVISORS:
        raise ValueError(
            f"divisor: expected one of {DIVISORS}, got {divisor!r}; choose 'positions' "
            "for what GSoP's release computes"
        )
    with autocast_off(x.device.type):
        x = at_least_float32(x)
        count = x.shape[1 if divisor == "channels" else 2]
        mean = x.sum(dim=1, keepdim=True) / count
        return matmul(x.mT, x) / count - mean.mT * mean


class RowGate(nn.Module):
    """Gates in (0, 1) from matrices: one for every output.

    Rows are normalised as channels, each row meets four filters of its own (a grouped
    convolution as tall as the row), and a 1x1 convolution mixes what comes out. There
    is no square root. The release has a ReLU between the two convolutions in the
    spatial branch only, its text in both: `act` chooses.
    """

    def __init__(self, dim: int, *, num_outputs: int, act: bool) -> None:
        super().__init__()
        mid_chs = ROW_MULTIPLIER * dim
        self.norm = nn.BatchNorm2d(dim)
        self.conv_rows = nn.Conv2d(dim, mid_chs, (dim, 1), groups=dim)
        self.act = nn.ReLU() if act else nn.Identity()
        self.fc = nn.Conv2d(mid_chs, num_outputs, 1)

    def forward(self, x: Float[Tensor, "b d d"]) -> Float[Tensor, "b k 1 1"]:
        """Return the gates; matrices come in float32, whatever the network's dtype."""
        x = self.norm(x.unsqueeze(-1).to(self.norm.weight.dtype))
        return self.fc(self.act(self.conv_rows(x))).sigmoid()


class ChannelGate(nn.Module):
    """Gate of every channel of a map by the covariance of its channels.

    ReLU, 1x1 convolution to `reduced_dim` channels, BatchNorm and ReLU, covariance over
    the positions, `RowGate`. With `stride` 2 every second position counts, as in a
    ResNet's first stage. Follows the released code; `act=True` adds the text's ReLU.
    """

    def __init__(
        self,
        in_chs: int,
        *,
        reduced_dim: int = REDUCED_DIM,
        stride: int = 1,
        act: bool = False,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_chs, reduced_dim, 1, stride=stride)
        self.norm = nn.BatchNorm2d(reduced_dim)
        self.rows = RowGate(reduced_dim, num_outputs=in_chs, act=act)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c 1 1"]:
        """Return one gate per channel."""
        reduced = self.norm(self.conv(x.relu())).relu()
        return self.rows(covariance(reduced.flatten(2).mT))


class SpatialGate(nn.Module):
    """Gate of every position of a map by the covariance of 8x8 of its positions.

    ReLU, 1x1 convolution, BatchNorm, average pooling to 8x8, `spatial_covariance`,
    `RowGate`; the 8x8 gates are resized to the map by adaptive average pooling. Follows
    the released code, also in the divisor.
    """

    def __init__(
        self,
        in_chs: int,
        *,
        reduced_dim: int = REDUCED_DIM,
        divisor: str = "positions",
    ) -> None:
        super().__init__()
        self.divisor = divisor
        self.conv = nn.Conv2d(in_chs, reduced_dim, 1)
        self.norm = nn.BatchNorm2d(reduced_dim)
        num_positions = GRID_SIZE * GRID_SIZE
        self.rows = RowGate(num_positions, num_outputs=num_positions, act=True)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 1 h w"]:
        """Return one gate per position."""
        reduced = self.norm(self.conv(x.relu()))
        reduced = F.adaptive_avg_pool2d(reduced, GRID_SIZE).flatten(2)
        gates = self.rows(spatial_covariance(reduced, divisor=self.divisor))
        gates = gates.view(-1, 1, GRID_SIZE, GRID_SIZE)
        return F.adaptive_avg_pool2d(gates, (x.shape[-2], x.shape[-1]))


class ConcatFusion(nn.Module):
    """Fusion of the two gated maps by a grouped convolution of both, concatenated.

    Written as the sum of one tall convolution each, with BatchNorm after it: groups of
    64 channels, kernels of 11, 9, 7 and 5 rows for 256 to 2048 channels.
    """

    def __init__(self, in_chs: int) -> None:
        super().__init__()
        num_groups = max(in_chs // CONCAT_GROUP_CHS, 1)
        factor = max(int(math.log2(CONCAT_BASE_GROUPS / num_groups)), 0)

        def conv() -> nn.Conv2d:
            return nn.Conv2d(
                in_chs,
                in_chs,
                (2 * factor + 5, 1),
                padding=(factor + 2, 0),
                groups=num_groups,
            )

        self.conv_channel, self.conv_spatial = conv(), conv()
        self.norm = nn.BatchNorm2d(in_chs)

    def forward(
        self,
        by_channel: Float[Tensor, "b c h w"],
        by_position: Float[Tensor, "b c h w"],
    ) -> Float[Tensor, "b c h w"]:
        """Return the joined map."""
        return self.norm(self.conv_channel(by_channel) + self.conv_spatial(by_position))


class Gsop(nn.Module):
    """Second-order attention that scales a map: GSoP (arXiv 1811.12006).

    `attention` is "channel" (x times its channel gates), "spatial" (ReLU of x times its
    position gates), or both joined: "avg" is their sum (the paper's word; the release
    adds and does not halve), "max" the larger, "concat" `ConcatFusion`. `act` and
    `divisor` choose the paper's text where the released code differs: see `RowGate` and
    `spatial_covariance`. Raises ValueError for an unknown `attention`.
    """

    def __init__(
        self,
        in_chs: int,
        *,
        attention: str = "channel",
        reduced_dim: int = REDUCED_DIM,
        stride: int = 1,
        act: bool = False,
        divisor: str = "positions",
    ) -> None:
        super().__init__()
        if attention not in ATTENTIONS:
            raise ValueError(
                f"attention: expected one of {ATTENTIONS}, got {attention!r}; "
                "'channel' is GSoP's own choice"
            )
        self.attention = attention
        self.channel = self.spatial = self.fusion = None
        if attention != "spatial":
            self.channel = ChannelGate(
                in_chs, reduced_dim=reduced_dim, stride=stride, act=act
            )
        if attention != "channel":
            self.spatial = SpatialGate(in_chs, reduced_dim=reduced_dim, divisor=divisor)
        if attention == "concat":
            self.fusion = ConcatFusion(in_chs)
        self.init_weights()

    def init_weights(self) -> None:
        """Draw convolutions as He normal by their fan-out, as ResNet's are."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Return the gated map."""
        by_channel = x if self.channel is None else x * self.channel(x)
        if self.spatial is None:
            return by_channel
        by_position = (x * self.spatial(x)).relu()
        if self.attention == "spatial":
            # The residual sum is made in place, and a ReLU keeps its result.
            return by_position.clone()
        if self.attention == "avg":
            return by_channel + by_position
        if self.fusion is None:
            return torch.maximum(by_channel, by_position)
        return self.fusion(by_channel, by_position)


def stages_of(model: ResNet) -> tuple[nn.Sequential, ...]:
    """Return the four stages of a ResNet, from the widest map to the narrowest."""
    stages = (model.get_submodule(f"layer{i + 1}") for i in range(NUM_STAGES))
    return tuple(cast(nn.Sequential, stage) for stage in stages)


def add_gsop(
    model: ResNet,
    *,
    stages: tuple[int, ...],
    attention: str = "channel",
    reduced_dim: int = REDUCED_DIM,
    act: bool = False,
    divisor: str = "positions",
) -> None:
    """Insert a GSoP block into the last residual block of some stages, from 1 on.

    It sees the map after the last norm, before the sum with the shortcut.
    """
    for index in stages:
        stage = stages_of(model)[index - 1]
        stage[len(stage) - 1].se = Gsop(
            cast(int, model.feature_info[index]["num_chs"]),
            attention=attention,
            reduced_dim=reduced_dim,
            stride=2 if index == 1 else 1,
            act=act,
            divisor=divisor,
        )
