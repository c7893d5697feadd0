"""The poolings' settings, lengths and agreement with their formulas."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch
from torch import Tensor

from sovit.moments import cross_covariance
from sovit.pooling import (
    AvgPool,
    CrossCovPool,
    MultiHeadPool,
    Pooling,
    build_pooling,
)
from sovit.svpn import svpn


def tokens() -> Tensor:
    return torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "changes",
    [
        {"type": "covariance"},
        {"normalizer": "sqrt"},
        {"start": "zeros"},
        {"centering": "rows"},
        {"reduced_dim": 0},
        {"reduced_dim": (8,)},
        {"reduced_dim": (8, 4.0)},
        {"num_heads": 0},
        {"power": 0.0},
        {"power": 1.1},
        {"num_iterations": 0},
        {"num_iterations": 1.5},
        {"num_singular_values": 0},
        {"num_singular_values": 25},
    ],
)
def test_bad_settings_are_refused_by_name(changes: dict[str, Any]) -> None:
    ((name, value),) = changes.items()
    with pytest.raises(ValueError, match=rf"Pooling\.{name} must be") as caught:
        Pooling(**changes)
    assert repr(value) in str(caught.value)


def test_changed_keeps_the_other_fields_and_refuses_unknown_ones() -> None:
    pooling = Pooling(reduced_dim=(8, 4), power=0.3)
    assert pooling.changed({"num_iterations": 2}) == Pooling(
        reduced_dim=(8, 4), power=0.3, num_iterations=2
    )
    with pytest.raises(ValueError, match=r"got \['pwer'\]"):
        pooling.changed({"pwer": 0.2})


def test_settings_come_back_from_json() -> None:
    pooling = Pooling(reduced_dim=(8, 4), num_singular_values=None)
    kept = json.dumps(dataclasses.asdict(pooling))
    assert Pooling(**json.loads(kept)) == pooling
    assert hash(Pooling(**json.loads(kept))) == hash(pooling)


@pytest.mark.parametrize("normalizer", ["svpn", "none"])
def test_cross_covariance_pooling_is_its_formula(normalizer: str) -> None:
    pooling = Pooling(reduced_dim=(6, 4), normalizer=normalizer)  # pyright: ignore[reportArgumentType]
    pool = CrossCovPool(16, pooling=pooling).eval()
    views = pool.norm(pool.reduction(tokens()).flatten(0, 1)).relu().view(2, 9, 10)
    matrix = cross_covariance(views[..., :6], views[..., 6:])
    if pool.normalize.start is not None:
        matrix = svpn(matrix.mT, pool.normalize.start).mT
    assert (pool.normalize.start is not None) == (normalizer == "svpn")
    torch.testing.assert_close(pool(tokens()), matrix.reshape(2, 24))


def test_multi_head_pooling_is_one_svpn_a_head() -> None:
    pooling = Pooling(
        type="multi_head", reduced_dim=(5, 4), num_heads=3, num_iterations=2
    )
    pool = MultiHeadPool(16, pooling=pooling).eval()
    first, second = pool.reduction(tokens()).split([15, 12], dim=-1)
    assert pool.normalize.start is not None
    heads = [
        svpn(
            cross_covariance(
                first[..., 5 * i : 5 * i + 5], second[..., 4 * i : 4 * i + 4]
            ),
            pool.normalize.start,
            num_iterations=2,
        ).flatten(1)
        for i in range(3)
    ]
    torch.testing.assert_close(pool(tokens()), torch.cat(heads, dim=1))


def test_average_pooling_is_the_mean() -> None:
    pool = build_pooling(Pooling(type="avg"), embed_dim=16)
    assert isinstance(pool, AvgPool)
    torch.testing.assert_close(pool(tokens()), tokens().mean(dim=1))


@pytest.mark.parametrize("type_", ["cross_cov", "multi_head", "avg"])
@pytest.mark.parametrize("num_singular_values", [1, 3, None])
@pytest.mark.parametrize("start", ["learned", "ones"])
def test_every_setting_trains_and_tells_its_length(
    type_: Any, num_singular_values: int | None, start: Any
) -> None:
    pooling = Pooling(
        type=type_,
        reduced_dim=(6, 4),
        num_heads=2,
        num_singular_values=num_singular_values,
        start=start,
    )
    pool = build_pooling(pooling, embed_dim=16)
    x = tokens().requires_grad_()
    vector = pool(x)
    assert vector.shape == (2, pool.num_features)
    vector.square().sum().backward()
    assert x.grad is not None
    for grad in [x.grad, *(p.grad for p in pool.parameters())]:
        assert grad is not None
        assert grad.isfinite().all()
    learned = "normalize.start" in dict(pool.named_parameters())
    assert learned == (start == "learned" and type_ != "avg")
    # A fixed start is the same everywhere, so no checkpoint holds it.
    assert ("normalize.start" in pool.state_dict()) == learned


@pytest.mark.parametrize("type_", ["cross_cov", "multi_head"])
def test_vector_keeps_the_dtype_of_the_tokens(type_: Any) -> None:
    pool = build_pooling(Pooling(type=type_, reduced_dim=4), embed_dim=16)
    vector = pool.to(torch.bfloat16)(tokens().bfloat16())
    assert vector.dtype == torch.bfloat16
