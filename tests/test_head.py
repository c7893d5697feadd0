"""The classifier's fusions, dropout and classes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sovit.head import FUSIONS, SecondOrderHead
from sovit.pooling import Pooling

POOLING = Pooling(reduced_dim=(6, 4))


def head(fusion: str = "sum", **kwargs: Any) -> SecondOrderHead:
    settings = {"num_classes": 5, "pooling": POOLING, **kwargs}
    return SecondOrderHead(16, fusion=fusion, **settings)


def tokens() -> Tensor:
    return torch.randn(3, 10, 16, generator=torch.Generator().manual_seed(0))


LENGTHS = {"sum": 40, "mean": 40, "concat": 40, "class": 16, "visual": 24}


@pytest.mark.parametrize("fusion", FUSIONS)
def test_logits_and_the_vector_before_them(fusion: str) -> None:
    module = head(fusion).eval()
    assert module.num_features == LENGTHS[fusion]
    vector = module(tokens(), pre_logits=True)
    assert vector.shape == (3, LENGTHS[fusion])
    # Every fusion is linear in that vector.
    weights = [fc.weight for fc in module.classifiers() if isinstance(fc, nn.Linear)]
    wanted = vector @ torch.cat(weights, dim=1).T / (1 + (fusion == "mean"))
    torch.testing.assert_close(module(tokens()), wanted)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_every_parameter_of_a_fusion_is_used(fusion: str) -> None:
    module = head(fusion)
    module(tokens()).square().sum().backward()
    assert [name for name, p in module.named_parameters() if p.grad is None] == []


def test_sum_adds_the_logits_of_two_classifiers() -> None:
    both, by_class, visual = (head(f).eval() for f in ("sum", "class", "visual"))
    assert by_class.load_state_dict(both.state_dict(), strict=False).missing_keys == []
    assert visual.load_state_dict(both.state_dict(), strict=False).missing_keys == []
    torch.testing.assert_close(both(tokens()), by_class(tokens()) + visual(tokens()))


def test_visual_ignores_the_class_token_and_class_the_others() -> None:
    changed = tokens()
    changed[:, 0] += 1
    visual, by_class = head("visual").eval(), head("class").eval()
    torch.testing.assert_close(visual(changed), visual(tokens()))
    changed = tokens()
    changed[:, 1:] += 1
    torch.testing.assert_close(by_class(changed), by_class(tokens()))


@pytest.mark.parametrize("fusion", FUSIONS)
def test_dropout_is_on_the_representation(fusion: str) -> None:
    module = head(fusion, drop_rate=0.5)
    torch.manual_seed(0)
    vector = module(tokens(), pre_logits=True)
    dropped = (vector == 0).float().mean(dim=0)
    if fusion in ("sum", "concat"):
        assert dropped[:16].sum() == 0
        dropped = dropped[16:]
    assert 0.3 < dropped.mean() < 0.9
    module.eval()
    assert torch.equal(module(tokens()), module(tokens()))


def test_classifiers_can_be_made_anew_and_left_out() -> None:
    module = head("sum", num_classes=0)
    assert module(tokens()).shape == (3, 40)
    module.reset(7)
    assert module(tokens()).shape == (3, 7)
    module.reset(0)
    assert [name for name, _ in module.named_parameters() if "fc" in name] == []
    with pytest.raises(ValueError, match="num_classes: expected at least 0"):
        module.reset(-1)


def test_unknown_fusion_is_refused() -> None:
    with pytest.raises(ValueError, match="got 'product'"):
        head("product")


def test_two_heads_of_other_settings_live_side_by_side() -> None:
    first = head("sum")
    before = {name: p.clone() for name, p in first.state_dict().items()}
    other = Pooling(type="multi_head", reduced_dim=3, num_heads=2, power=0.3)
    second = head("concat", pooling=other)
    second(tokens()).sum().backward()
    assert first.num_features == 16 + 24
    assert second.num_features == 16 + 18
    assert all(torch.equal(p, before[name]) for name, p in first.state_dict().items())
    first(tokens()).sum().backward()
