"""Token embeddings and the position table."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from sovit.architectures.tokens import (
    TOKEN_STRIDES,
    ConvEmbed,
    DenseStage,
    LinearEmbed,
    build_token_embed,
    check_img_size,
)
from sovit.architectures.vit import resize_table, sinusoid_table


@pytest.mark.parametrize("kind", ["resnet", "densenet", "linear"])
@pytest.mark.parametrize(
    ("stride", "size"),
    [(16, (32, 32)), (16, (32, 64)), (16, (48, 32)), (8, (16, 40)), (4, (28, 8))],
)
def test_a_square_of_pixels_is_a_token(
    kind: str, stride: int, size: tuple[int, int]
) -> None:
    assert check_img_size(size, token_stride=stride) == size
    embed = build_token_embed(kind, embed_dim=12, in_chans=1, token_stride=stride)
    tokens = embed(torch.randn(2, 1, *size))
    assert tokens.shape == (2, size[0] // stride * (size[1] // stride), 12)
    tokens.square().sum().backward()
    assert all(p.grad is not None for p in embed.parameters())


@pytest.mark.parametrize("kind", ["resnet", "densenet", "linear"])
def test_tokens_run_row_by_row(kind: str) -> None:
    torch.manual_seed(0)  # with some weights a neighbour changes more
    embed = build_token_embed(kind, embed_dim=8).eval()
    image = torch.randn(1, 3, 64, 96)
    changed = image.clone()
    changed[:, :, 18:30, 34:46] += 1
    moved = (embed(image) - embed(changed)).norm(dim=-1).view(4, 6)
    # Of 4 x 6 tokens the one in the second row and third column has those pixels.
    assert moved.argmax() == 1 * 6 + 2


@pytest.mark.parametrize("kind", ["resnet", "densenet", "linear"])
@pytest.mark.parametrize("stride", TOKEN_STRIDES)
def test_smaller_tokens_do_too(kind: str, stride: int) -> None:
    torch.manual_seed(0)
    embed = build_token_embed(kind, embed_dim=8, token_stride=stride).eval()
    image = torch.randn(1, 3, 10 * stride, 14 * stride)
    changed = image.clone()
    rows, columns = (slice(i * stride, (i + 3) * stride) for i in (6, 3))
    changed[:, :, rows, columns] += 1
    moved = (embed(image) - embed(changed)).norm(dim=-1).view(10, 14)
    # The token that changes most is one of the 3 x 3 that have those pixels.
    row, column = divmod(int(moved.argmax()), 14)
    assert row in (6, 7, 8)
    assert column in (3, 4, 5)


def test_unknown_embedding_is_refused() -> None:
    with pytest.raises(ValueError, match="got 'inception'"):
        build_token_embed("inception", embed_dim=8)


@pytest.mark.parametrize("size", [16, 100, 0, (32, 40), (32, 16)])
def test_sizes_off_the_grid_are_refused(size: int | tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="multiple of 16 from 32 up"):
        check_img_size(size)
    with pytest.raises(ValueError, match="expected one of"):
        build_token_embed("linear", embed_dim=8, token_stride=2)


def test_a_size_that_another_stride_takes_names_it() -> None:
    with pytest.raises(ValueError, match=r"multiple of 16.*, or set token_stride=4$"):
        check_img_size(28)
    with pytest.raises(ValueError, match=r"multiple of 8 from 16.*example to 224$"):
        check_img_size(30, token_stride=8)


@pytest.mark.parametrize("kind", ["resnet", "densenet"])
def test_a_larger_map_comes_of_the_same_weights(kind: str) -> None:
    wide = build_token_embed(kind, embed_dim=8, token_stride=8).eval()
    embed = build_token_embed(kind, embed_dim=8).eval()
    embed.load_state_dict(wide.state_dict())
    image = torch.randn(1, 3, 32, 32)
    maps = []
    for one in (wide, embed):
        assert isinstance(one, ConvEmbed)
        *first, last = one.stages
        x = one.pool(one.stem(image))
        for stage in first:
            x = stage(x)
        maps.append((x, last(x)))
    # Up to the last stage nothing differs, and that halves no more.
    torch.testing.assert_close(maps[0][0], maps[1][0], rtol=0, atol=0)
    assert [tuple(last.shape[-2:]) for _, last in maps] == [(4, 4), (2, 2)]


def test_dense_layers_have_no_normalisation_and_transitions_no_activation() -> None:
    stage = DenseStage(8)
    assert [n for n, _ in stage.named_modules() if "norm" in n] == ["norm"]
    # Without an activation in the transition a shift of the norm is a shift of the
    # output, however far down it goes.
    x = torch.randn(2, 8, 4, 4)
    stage.eval()
    before = stage(x)
    with torch.no_grad():
        stage.norm.bias.sub_(100)
    shift = -100 * stage.conv.weight.sum(dim=(1, 2, 3))
    torch.testing.assert_close(
        stage(x) - before, shift[:, None, None].expand_as(before), rtol=1e-4, atol=1e-3
    )


def test_pooling_before_the_convolution_changes_nothing() -> None:
    stage = DenseStage(8).eval()
    x = torch.randn(2, 8, 8, 8)
    ours = stage(x)
    conv, pool = stage.conv, stage.pool
    stage.pool, stage.conv = conv, pool  # pyright: ignore[reportAttributeAccessIssue]
    torch.testing.assert_close(ours, stage(x), rtol=1e-4, atol=1e-5)


def test_stem_has_bias_and_stages_halve() -> None:
    embed = ConvEmbed(8)
    assert embed.stem.bias is not None
    x = embed.pool(embed.stem(torch.randn(1, 3, 64, 64)))
    assert x.shape[-1] == 32
    for stage, wanted in zip(embed.stages, (16, 8, 4), strict=True):
        x = stage(x)
        assert x.shape[-1] == wanted


def test_linear_embedding_is_one_map_of_each_patch() -> None:
    embed = LinearEmbed(5)
    image = torch.randn(1, 3, 32, 32)
    patch = image[0, :, 16:, :16].flatten()
    assert embed.proj.bias is not None
    wanted = embed.proj.weight.flatten(1) @ patch + embed.proj.bias
    torch.testing.assert_close(embed(image)[0, 2], wanted, rtol=1e-4, atol=1e-5)


def test_table_has_sines_on_even_and_cosines_on_odd_channels() -> None:
    table = sinusoid_table(197, 256)
    assert table.shape == (1, 197, 256)
    assert table[0, 0].tolist() == [0.0, 1.0] * 128
    for position, channel in ((1, 0), (196, 10), (57, 254)):
        angle = position / 10000 ** (channel / 256)
        assert table[0, position, channel].item() == pytest.approx(
            math.sin(angle), abs=1e-6
        )
        assert table[0, position, channel + 1].item() == pytest.approx(
            math.cos(angle), abs=1e-6
        )
    with pytest.raises(ValueError, match="expected an even number"):
        sinusoid_table(5, 7)


def test_sinusoid_table_is_rebuilt_for_another_grid() -> None:
    got = resize_table(sinusoid_table(197, 16), grid_size=(3, 5))
    torch.testing.assert_close(got, sinusoid_table(16, 16), rtol=0, atol=0)


def test_other_tables_are_interpolated_from_their_square_grid() -> None:
    table = torch.randn(1, 1 + 4 * 4, 16)
    got = resize_table(table, grid_size=(2, 3))
    grid = table[:, 1:].mT.unflatten(-1, (4, 4))
    wanted = functional.interpolate(grid, (2, 3), mode="bicubic", antialias=True)
    torch.testing.assert_close(got[:, 1:], wanted.flatten(2).mT)
    assert torch.equal(got[:, 0], table[:, 0])
    assert resize_table(table, grid_size=(4, 4)) is table
    with pytest.raises(ValueError, match="square grid"):
        resize_table(torch.randn(1, 1 + 6, 16), grid_size=(4, 4))
