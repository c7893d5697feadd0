"""DropCov: its rates are their formula, and what is dropped is whole."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import sovit
from sovit.drop_cov import ChannelDrop, drop_channels, drop_rates, drop_tokens
from sovit.moments import covariance
from sovit.pooling import Pooling, build_pooling

WIDTH = 256


def maps(*, num_images: int = 4) -> Tensor:
    """Make features of a ReLU, whose channels differ in size and go together."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(num_images, 49, WIDTH, generator=generator, dtype=torch.float64)
    mixing = torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64)
    return (x @ (mixing / torch.arange(1, WIDTH + 1)[:, None] ** 0.5)).relu()


@pytest.mark.parametrize("per_image", [False, True])
def test_rates_are_the_papers_formula(per_image: bool) -> None:
    x = maps() * torch.tensor([1.0, 2.0, 3.0, 4.0])[:, None, None]
    weights = x.mean(dim=1).softmax(dim=-1)
    rows = covariance(x).sum(dim=-1)
    cosines = torch.stack(
        [w @ r / (w.norm() * r.norm()) for w, r in zip(weights, rows, strict=True)]
    )
    if not per_image:
        cosines = cosines.mean().expand(4)
    wanted = (1 - 10 / math.log2(WIDTH) * cosines).clamp(0, 0.9)
    assert 0 < wanted.max() < 0.9
    got = drop_rates(x, weights, per_image=per_image)
    torch.testing.assert_close(got.flatten(), wanted)
    assert (len(got.unique()) > 1) == per_image


def test_no_rate_is_without_end() -> None:
    for x in (torch.zeros(2, 9, 16), torch.ones(2, 1, 16)):
        rates = drop_rates(x, torch.full((2, 16), 1 / 16), per_image=True)
        assert torch.equal(rates, torch.full((2, 1, 1), 0.9))


def test_whole_channels_go_for_each_image_and_the_diagonal_grows() -> None:
    x = maps(num_images=1).expand(4000, -1, -1)[..., :8].float()
    torch.manual_seed(0)
    dropped = drop_channels(x, 0.3)
    gone = (dropped == 0).all(dim=1)
    assert gone.float().mean(dim=0).sub(0.3).abs().max() < 0.03
    assert len(gone.unique(dim=0)) > 100
    kept = ~gone[:, None, :].expand_as(x)
    torch.testing.assert_close(dropped[kept], x[kept] / 0.7)
    before, after = covariance(x[0]), covariance(dropped).mean(dim=0)
    ratio = after / before
    off = ~torch.eye(8, dtype=torch.bool)
    strong = off & (before.abs() > before.abs().mean() / 4)
    assert ratio[strong].sub(1).abs().max() < 0.15
    assert ratio.diagonal().sub(1 / 0.7).abs().max() < 0.1


def test_tokens_go_whole_from_both_views_of_a_head() -> None:
    torch.manual_seed(0)
    views = torch.ones(16, 3, 40, 6), torch.ones(16, 3, 40, 4)
    first, second = drop_tokens(views, rate=0.2)
    assert set(first.unique().tolist()) == {0.0, 1.25}
    kept = first[..., :1]
    assert torch.equal(first, kept.expand_as(first))
    assert torch.equal(second, kept.expand_as(second))
    assert not torch.equal(kept[:, 0], kept[:, 1])
    assert abs((kept == 0).float().mean() - 0.2) < 0.03


@pytest.mark.parametrize("name", ["drop_cov", "drop_cov_tokens"])
def test_it_drops_in_training_only(name: str) -> None:
    dim = 8 if name == "drop_cov" else 4
    pooling = Pooling.named(name, reduced_dim=dim)
    if name == "drop_cov":
        pooling = pooling.changed({"channel_drop": 0.5})
    plain = pooling.changed({"channel_drop": 0.0, "token_drop": 0.0})
    torch.manual_seed(0)
    pool = build_pooling(pooling, embed_dim=16)
    other = build_pooling(plain, embed_dim=16)
    other.load_state_dict(pool.state_dict())
    x = torch.randn(2, 9, 16)
    assert torch.equal(pool.eval()(x), other.eval()(x))
    assert not torch.equal(pool.train()(x), other.train()(x))
    assert not torch.equal(pool(x), pool(x))


def test_the_weights_are_learned_through_what_they_multiply() -> None:
    drop = ChannelDrop(16, rate="batch")
    x = torch.randn(2, 9, 16, requires_grad=True)
    torch.manual_seed(0)
    drop(x).square().sum().backward()
    assert drop.conv is not None
    assert drop.conv.weight.grad is not None
    assert drop.conv.weight.grad.abs().sum() > 0
    assert torch.equal(drop.eval()(x), x)
    with pytest.raises(ValueError, match="channel_drop='batch': expected at least 2"):
        ChannelDrop(1, rate="batch")


@pytest.mark.parametrize(
    ("name", "millions"),
    [("resnet34", 29.6), ("resnet50", 32.0), ("resnet101", 51.0)],
)
def test_networks_have_the_published_number_of_parameters(
    name: str, millions: float
) -> None:
    model = sovit.second_order(name, pooling="drop_cov", device="meta")
    count = sum(parameter.numel() for parameter in model.parameters())
    assert round(count / 1e6, 1) == millions
