"""GSoP blocks as the paper's formulas, and where blocks sit in a network."""

from __future__ import annotations

import math

import pytest
import timm
import torch
from timm.layers.eca import EcaModule
from timm.models import EfficientNet, ResNet
from timm.models.resnet import Bottleneck
from torch import Tensor, nn

from sovit.attention import (
    ATTENTIONS,
    ChannelGate,
    ConcatFusion,
    Gsop,
    RowGate,
    SpatialGate,
    add_gsop,
    spatial_covariance,
    stages_of,
)
from sovit.networks.eca_gsop import add_eca, add_mobile_eca

# Counted from the layers of the release: 1x1, row norm, grouped convolution, 1x1.
CHANNEL_PARAMETERS = {256: 230_784, 512: 394_880, 1024: 723_072, 2048: 1_379_456}


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*shape, generator=generator, dtype=dtype)


def num_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("in_chs", CHANNEL_PARAMETERS)
def test_channel_block_has_the_counted_parameters(in_chs: int) -> None:
    with torch.device("meta"):
        assert num_parameters(Gsop(in_chs)) == CHANNEL_PARAMETERS[in_chs]


def test_spatial_covariance_is_one_over_the_channels() -> None:
    x = random(2, 7, 4, dtype=torch.float64)
    wanted = torch.stack([torch.cov(one.T, correction=0) for one in x])
    torch.testing.assert_close(spatial_covariance(x, divisor="channels"), wanted)
    ratio = 7 / 4
    second = torch.einsum("bci,bcj->bij", x, x) / 7
    mean = x.mean(dim=1)
    released = ratio * second - ratio**2 * mean[:, :, None] * mean[:, None, :]
    torch.testing.assert_close(spatial_covariance(x), released)
    square = random(2, 5, 5)
    torch.testing.assert_close(
        spatial_covariance(square), spatial_covariance(square, divisor="channels")
    )


@pytest.mark.parametrize("act", [False, True])
def test_a_row_gate_gives_each_row_its_own_filters(act: bool) -> None:
    gate = RowGate(3, num_outputs=2, act=act).eval()
    matrix = random(2, 3, 3)
    filters = gate.conv_rows.weight.view(3, 4, 3)
    normed = matrix / math.sqrt(1 + gate.norm.eps)
    rows = torch.einsum("bij,ikj->bik", normed, filters).flatten(1)
    rows = rows + gate.get_parameter("conv_rows.bias")
    rows = rows.relu() if act else rows
    mixed = rows @ gate.fc.weight.view(2, 12).T + gate.get_parameter("fc.bias")
    wanted = mixed.sigmoid()
    torch.testing.assert_close(gate(matrix).flatten(1), wanted)


@pytest.mark.parametrize("stride", [1, 2])
def test_channel_gates_come_from_the_covariance(stride: int) -> None:
    gate = ChannelGate(6, reduced_dim=4, stride=stride).eval()
    x = random(2, 6, 5, 4)
    reduced = gate.norm(gate.conv(x.relu())).relu()
    assert reduced.shape[-2:] == ((5, 4) if stride == 1 else (3, 2))
    matrix = torch.stack([torch.cov(m.flatten(1), correction=0) for m in reduced])
    assert gate(x).shape == (2, 6, 1, 1)
    torch.testing.assert_close(gate(x), gate.rows(matrix))


@pytest.mark.parametrize("size", [(8, 8), (16, 24), (5, 7)])
def test_spatial_gates_fit_the_map(size: tuple[int, int]) -> None:
    gate = SpatialGate(6, reduced_dim=4).eval()
    gates = gate(random(2, 6, *size))
    assert gates.shape == (2, 1, *size)
    assert ((gates > 0) & (gates < 1)).all()
    if size == (16, 24):
        blocks = gates.view(2, 8, 2, 8, 3)
        assert (blocks == blocks[:, :, :1, :, :1]).all()


def test_fusions_are_sum_maximum_and_convolution() -> None:
    x = random(2, 64, 8, 8)
    block = Gsop(64, attention="concat", reduced_dim=4).eval()
    channel, spatial, fusion = block.channel, block.spatial, block.fusion
    assert channel is not None
    assert spatial is not None
    assert fusion is not None
    by_channel = x * channel(x)
    by_position = (x * spatial(x)).relu()
    wanted = {
        "channel": by_channel,
        "spatial": by_position,
        "avg": by_channel + by_position,
        "max": torch.maximum(by_channel, by_position),
        "concat": fusion(by_channel, by_position),
    }
    for attention in ATTENTIONS:
        other = Gsop(64, attention=attention, reduced_dim=4).eval()
        other.load_state_dict(block.state_dict(), strict=False)
        torch.testing.assert_close(other(x), wanted[attention], msg=attention)


@pytest.mark.parametrize(
    ("in_chs", "kernel"), [(256, 11), (512, 9), (1024, 7), (2048, 5)]
)
def test_concatenation_has_the_released_kernels(in_chs: int, kernel: int) -> None:
    with torch.device("meta"):
        conv = ConcatFusion(in_chs).conv_channel
        assert conv.kernel_size == (kernel, 1)
        assert conv.groups == in_chs // 64
        assert conv(torch.zeros(1, in_chs, 14, 14)).shape == (1, in_chs, 14, 14)


def test_the_joined_map_is_a_convolution_of_the_concatenation() -> None:
    fusion = ConcatFusion(64).eval()
    one, other = random(2, 64, 6, 6), random(2, 64, 6, 6).flip(0)
    both = nn.functional.conv2d(
        torch.cat([one, other], dim=1),
        torch.cat([fusion.conv_channel.weight, fusion.conv_spatial.weight], dim=1),
        fusion.get_parameter("conv_channel.bias")
        + fusion.get_parameter("conv_spatial.bias"),
        padding=(7, 0),
    )
    torch.testing.assert_close(fusion(one, other), fusion.norm(both))


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_gradients_reach_everything_under_autocast(attention: str) -> None:
    block = Gsop(64, attention=attention, reduced_dim=8)
    x = random(4, 64, 8, 8).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        block(x).square().mean().backward()
    for name, p in (("x", x), *block.named_parameters()):
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
    whole = block.eval().to(torch.bfloat16)
    assert whole(x.detach().bfloat16()).dtype == torch.bfloat16


def test_unknown_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="got 'sum'"):
        Gsop(64, attention="sum")
    with pytest.raises(ValueError, match="got 'tokens'"):
        spatial_covariance(random(1, 2, 2), divisor="tokens")


def resnet(name: str) -> ResNet:
    with torch.device("meta"):
        model = timm.create_model(name)
    assert isinstance(model, ResNet)
    return model


def test_gsop_sits_at_the_end_of_the_chosen_stages() -> None:
    model = resnet("resnet50")
    with torch.device("meta"):
        add_gsop(model, stages=(1, 3))
    places = {n: m for n, m in model.named_modules() if isinstance(m, Gsop)}
    assert list(places) == ["layer1.2.se", "layer3.5.se"]
    gates = [block.channel for block in places.values()]
    assert [gate.conv.stride for gate in gates if gate] == [(2, 2), (1, 1)]
    assert [gate.conv.in_channels for gate in gates if gate] == [256, 1024]


def test_attention_sees_the_map_between_the_last_norm_and_the_sum() -> None:
    model = ResNet(Bottleneck, (1, 1, 1, 1), channels=(4, 4, 4, 4)).eval()  # pyright: ignore[reportArgumentType]
    block = stages_of(model)[1][0]
    assert isinstance(block, Bottleneck)
    block.se = nn.Threshold(math.inf, 0.0)
    assert block.downsample is not None
    x = random(1, 16, 8, 8)
    # With nothing let through, the shortcut is what is left.
    torch.testing.assert_close(block(x), block.downsample(x).relu())


def test_eca_sits_in_every_block_with_its_stage_s_kernel() -> None:
    model = resnet("resnet18")
    with torch.device("meta"):
        add_eca(model, kernel_sizes=(1, 3, 5, 7))
    for stage, kernel in zip(stages_of(model), (1, 3, 5, 7), strict=True):
        blocks = [block.get_submodule("se") for block in stage]
        assert all(isinstance(block, EcaModule) for block in blocks)
        assert {block.get_parameter("conv.weight").shape for block in blocks} == {
            (1, 1, kernel)
        }
    with pytest.raises(ValueError, match="four odd numbers"):
        add_eca(model, kernel_sizes=(3, 5, 5))
    with pytest.raises(ValueError, match="four odd numbers"):
        add_eca(model, kernel_sizes=(3, 5, 5, 4))


def test_eca_ends_every_block_of_a_mobile_net() -> None:
    with torch.device("meta"):
        model = timm.create_model("mobilenetv2_100")
        assert isinstance(model, EfficientNet)
        plain = num_parameters(model)
        add_mobile_eca(model)
    places = {n: m for n, m in model.named_modules() if isinstance(m, EcaModule)}
    assert len(places) == 17
    assert list(places)[:2] == ["blocks.0.0.bn2.act", "blocks.1.0.bn3.act"]
    # Ten blocks are narrower than 96 channels; the seven others have three weights.
    kernels = [num_parameters(place) for place in places.values()]
    assert kernels == [1] * 10 + [3] * 7
    assert num_parameters(model) == plain + 10 + 21


def test_eca_of_a_mobile_net_scales_what_the_block_adds() -> None:
    model = timm.create_model("mobilenetv2_035").eval()
    assert isinstance(model, EfficientNet)
    block = model.get_submodule("blocks.1.1")
    x = random(1, 8, 8, 8)
    added = block(x) - x
    add_mobile_eca(model)
    eca = model.get_submodule("blocks.1.1.bn3.act")
    torch.testing.assert_close(block(x), eca(added) + x)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_a_network_can_be_trained_with_each_attention(attention: str) -> None:
    """The residual sum after a block is made in place."""
    model = timm.create_model(
        "gsop_resnet50_1", num_classes=3, layers=(1, 1, 1, 1), attention=attention
    )
    model(torch.randn(2, 3, 64, 64)).square().sum().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(gradients) == len(list(model.parameters()))
    assert all(gradient.isfinite().all() for gradient in gradients)
