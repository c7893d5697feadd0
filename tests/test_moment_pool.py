"""The moment head is its formula, of the published size, and safe at its edges."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from sovit.head import SecondOrderHead
from sovit.moment_pool import MomentPool
from sovit.pooling import Pooling, build_pooling

SMALL = Pooling.named("moment", reduced_dim=8, num_heads=3)


def tokens(num_tokens: int = 9) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, num_tokens, 16, generator=generator, dtype=torch.float64)


def pool(pooling: Pooling = SMALL) -> MomentPool:
    torch.manual_seed(0)
    built = build_pooling(pooling, embed_dim=16)
    assert isinstance(built, MomentPool)
    for parameter in built.parameters():
        nn.init.normal_(parameter, std=0.5)
    return built.double()


def by_the_formula(module: MomentPool, x: Tensor) -> Tensor:
    """Compute head by head and image by image, as the paper's figure has it."""
    linear, norm = module.reduction, module.norm
    convs = [conv for conv in module.shorten if isinstance(conv, nn.Conv2d)]
    vectors = []
    for image in x:
        heads = (image @ linear.weight.T + linear.bias).split(8, dim=-1)
        heads = [norm(head) for head in heads]
        heads = [head - head.mean() for head in heads]
        moments = []
        for first, second in itertools.pairwise(heads):
            outers = [torch.outer(a, b) for a, b in zip(first, second, strict=True)]
            moment = torch.stack(outers).mean(dim=0)
            moments.append(moment / moment.norm(dim=0))
        matrices = torch.stack(moments)[None]
        for conv in convs:
            matrices = functional.conv2d(matrices, conv.weight, stride=2)
            matrices = functional.gelu(matrices)
        vectors.append(matrices.flatten())
    return torch.stack(vectors)


def test_it_is_the_papers_formula() -> None:
    module = pool()
    wanted = by_the_formula(module, tokens())
    assert wanted.shape == (2, module.num_features) == (2, 2)
    torch.testing.assert_close(module(tokens()), wanted)


def test_the_published_head_has_its_size() -> None:
    """4,047,146 with the linear map, which the published 3,653,418 leave out."""
    with torch.device("meta"):
        head = SecondOrderHead(768, pooling=Pooling.named("moment"), fusion="mean")
    count = sum(parameter.numel() for parameter in head.parameters())
    assert head.visual_dim == 2883
    assert isinstance(head.pool, MomentPool)
    linear = sum(parameter.numel() for parameter in head.pool.reduction.parameters())
    assert (count, count - linear) == (4_047_146, 3_653_418)


def test_its_logits_are_the_mean_of_two_classifiers() -> None:
    torch.manual_seed(0)
    head: Any = SecondOrderHead(16, num_classes=5, pooling=SMALL, fusion="mean")
    head = head.double()
    x = tokens()
    of_class = head.fc_class(x[:, 0])
    of_moments = head.fc_visual(head.pool(x[:, 1:]))
    torch.testing.assert_close(head(x), (of_class + of_moments) / 2)


def test_its_derivatives_are_right() -> None:
    module, x = pool(), tokens(4).requires_grad_()
    assert torch.autograd.gradcheck(module, x)
    assert torch.autograd.gradgradcheck(module, x)


@pytest.mark.parametrize("num_tokens", [1, 9])
def test_equal_tokens_and_half_precision_give_numbers(num_tokens: int) -> None:
    module = pool().float()
    equal = torch.full((2, num_tokens, 16), 0.7, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        vector = module(equal)
    vector.sum().backward()
    assert vector.isfinite().all()
    assert equal.grad is not None
    assert equal.grad.isfinite().all()
    wanted = module(tokens().float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = module(tokens().float())
    assert (got - wanted).norm() < 0.1 * wanted.norm()


def test_what_is_no_number_stays_with_its_image() -> None:
    module, bad = pool(), tokens()
    bad[0, 3, 2] = float("nan")
    got = module(bad)
    assert got[0].isnan().all()
    torch.testing.assert_close(got[1], module(tokens())[1])


def test_images_are_mapped_alone() -> None:
    module = pool()
    got = torch.func.vmap(lambda image: module(image[None])[0])(tokens())
    torch.testing.assert_close(got, module(tokens()))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"reduced_dim": 6}, "reduced_dim"),
        ({"reduced_dim": (8, 8)}, "reduced_dim"),
        ({"num_heads": 1}, "num_heads"),
        ({"normalizer": "svpn"}, "normalizer"),
        ({"token_drop": 0.1}, "token_drop"),
        ({"shrinkage": 0.1}, "shrinkage"),
        ({"channel_drop": "image"}, "channel_drop"),
    ],
)
def test_settings_that_do_not_fit_are_named(changes: dict, named: str) -> None:
    with pytest.raises(ValueError, match=rf"Pooling\.{named}: expected"):
        Pooling.named("moment", **changes)
