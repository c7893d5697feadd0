"""The poolings' settings, lengths and agreement with their formulas."""

from __future__ import annotations

import dataclasses
import json
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from sovit.moments import (
    covariance,
    cross_covariance,
    gaussian_embedding,
    upper_triangle,
)
from sovit.networks.so_vit import default_pooling
from sovit.newton_schulz import newton_schulz_sqrt
from sovit.normalize import signed_sqrt
from sovit.pooling import (
    METHODS,
    AvgPool,
    CovPool,
    CrossCovPool,
    FewTokensWarning,
    MultiHeadPool,
    Pooling,
    Reduction,
    as_pooling,
    build_pooling,
)
from sovit.powers import matrix_log, matrix_power
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
        {"pre_norm": "max"},
        {"act_layer": "gelu"},
        {"token_drop": 1.0},
        {"token_drop": -0.1},
        {"shrinkage": 1.0},
        {"shrinkage": 0.5},
        {"channel_drop": "batch"},
        {"num_groups": 2},
        {"progressive_dims": (32,)},
        {"normalizer": "newton_schulz"},
        {"normalizer": "eigen"},
    ],
)
def test_bad_settings_are_refused_by_name(changes: dict[str, Any]) -> None:
    ((name, value),) = changes.items()
    with pytest.raises(ValueError, match=rf"Pooling\.{name}: expected") as caught:
        Pooling(**changes)
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"reduced_dim": (8, 8)},
        {"num_groups": 3},
        {"num_heads": 2},
        {"progressive_dims": (8, 0)},
        {"normalizer": "svd"},
        {"num_singular_values": 9},
    ],
)
@pytest.mark.parametrize("type_", ["cov", "gaussian"])
def test_bad_settings_of_a_covariance_are_refused(
    type_: Any, changes: dict[str, Any]
) -> None:
    ((name, value),) = changes.items()
    with pytest.raises(ValueError, match=rf"Pooling\.{name}: expected") as caught:
        Pooling(**{"type": type_, "reduced_dim": 8, **changes})
    assert repr(value) in str(caught.value)


def test_methods_have_names() -> None:
    for name in METHODS:
        build_pooling(Pooling.named(name), embed_dim=16)
    isqrt = Pooling.named("isqrt_cov", reduced_dim=128)
    assert (isqrt.normalizer, isqrt.num_iterations) == ("newton_schulz", 5)
    assert isqrt.reduced_dim == 128
    assert Pooling.named("svpn") == default_pooling("so_vit_7")
    assert Pooling.named("multi_head_svpn") == default_pooling("sot_tiny")
    default = Pooling(reduced_dim=(8, 4))
    assert as_pooling("isqrt_cov", default=default).reduced_dim == 256
    assert as_pooling(isqrt, default=default) is isqrt
    assert as_pooling({"power": 0.3}, default=default).reduced_dim == (8, 4)
    with pytest.raises(ValueError, match=r"'mpn_cov'.*got 'mpncov'"):
        Pooling.named("mpncov")


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


NORMALIZERS: dict[str, Any] = {
    "none": lambda matrix: matrix,
    "newton_schulz": lambda matrix: newton_schulz_sqrt(matrix, num_iterations=3),
    "eigen": matrix_power,
    "log": matrix_log,
    "signed_sqrt": signed_sqrt,
    "scale": lambda matrix: matrix / matrix.shape[-1] ** 0.5,
    "learned_scale": lambda matrix: matrix / matrix.shape[-1] ** 0.5,
    "layer_norm": lambda matrix: layer_norm(matrix, matrix.shape[-1:]),
    "svpn": lambda matrix: svpn(matrix, torch.ones(matrix.shape[-1]), num_iterations=3),
}


@pytest.mark.parametrize("type_", ["cov", "gaussian"])
@pytest.mark.parametrize("reduced_dim", [6, 12])
@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_covariance_pooling_is_its_formula(
    normalizer: Any, reduced_dim: int, type_: Any
) -> None:
    """Nine tokens: six channels go the long way, twelve the short one."""
    pooling = Pooling(
        type=type_,
        reduced_dim=reduced_dim,
        normalizer=normalizer,
        num_iterations=3,
        start="ones",
    )
    # The logarithm magnifies what the two ways round differently: by the weights.
    torch.manual_seed(0)
    pool = CovPool(16, pooling=pooling).eval()
    (layer,) = pool.reduction
    assert isinstance(layer, Reduction)
    narrow = (layer.linear(tokens()) / (1 + layer.norm.eps) ** 0.5).relu()
    matrix = covariance(narrow)
    if type_ == "gaussian":
        matrix = gaussian_embedding(narrow)
    matrix = NORMALIZERS[normalizer](matrix)
    side = matrix.shape[-1]
    wanted = [matrix[:, i, j] for i in range(side) for j in range(i, side)]
    assert pool.num_features == side * (side + 1) // 2
    torch.testing.assert_close(
        pool(tokens()), torch.stack(wanted, dim=1), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(
    ("dim", "num_groups", "length"),
    [(256, 1, 32_896), (256, 2, 16_512), (256, 4, 8_320), (64, 1, 2_080)],
)
def test_lengths_are_those_of_the_papers(
    dim: int, num_groups: int, length: int
) -> None:
    pooling = Pooling.named("isqrt_cov", reduced_dim=dim, num_groups=num_groups)
    assert CovPool(8, pooling=pooling).num_features == length
    gaussian = Pooling.named("gaussian")
    assert CovPool(8, pooling=gaussian).num_features == 33_153


def test_groups_are_covariances_of_their_own_channels() -> None:
    pooling = Pooling.named("isqrt_cov", reduced_dim=None, num_groups=2)
    pool = CovPool(16, pooling=pooling)
    wanted = [
        upper_triangle(newton_schulz_sqrt(covariance(part)))
        for part in tokens().split(8, dim=-1)
    ]
    torch.testing.assert_close(pool(tokens()), torch.cat(wanted, dim=1))
    with pytest.raises(ValueError, match="num_groups: expected a divisor of the 9"):
        CovPool(9, pooling=pooling)


def test_progressive_reduction_narrows_step_by_step() -> None:
    pooling = Pooling.named("isqrt_cov", progressive_dims=(12, 8), reduced_dim=4)
    pool = CovPool(16, pooling=pooling)
    shapes = [
        tuple(layer.linear.weight.shape)
        for layer in pool.reduction
        if isinstance(layer, Reduction)
    ]
    assert shapes == [(12, 16), (8, 12), (4, 8)]
    assert pool(tokens()).shape == (2, 10)


@pytest.mark.parametrize(
    "normalizer",
    ["svpn", "svd", "signed_sqrt", "layer_norm", "scale", "learned_scale", "none"],
)
@pytest.mark.parametrize("type_", ["cross_cov", "multi_head"])
def test_every_normalizer_of_rectangles_trains(type_: Any, normalizer: Any) -> None:
    pooling = Pooling(
        type=type_, reduced_dim=(6, 4), num_heads=2, normalizer=normalizer
    )
    pool = build_pooling(pooling, embed_dim=16)
    pool(tokens()).square().sum().backward()
    for parameter in pool.parameters():
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()


@pytest.mark.parametrize("name", [name for name in METHODS if name != "avg"])
@pytest.mark.parametrize("bfloat16", [False, True])
def test_order_of_tokens_does_not_matter_nor_does_an_empty_map(
    name: str, bfloat16: bool
) -> None:
    small = {"svpn": (6, 4), "multi_head_svpn": 4, "moment": 8}.get(name, 6)
    pool = build_pooling(Pooling.named(name, reduced_dim=small), embed_dim=16)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bfloat16):
        pool.eval()
        torch.testing.assert_close(
            pool(tokens()[:, order]), pool(tokens()), rtol=1e-3, atol=1e-4
        )
        pool.train()
        zero = torch.zeros(2, 9, 16, requires_grad=True)
        vector = pool(zero)
        vector.sum().backward()
    assert vector.isfinite().all()
    assert zero.grad is not None
    assert zero.grad.isfinite().all()
    for parameter in pool.parameters():
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()


@pytest.mark.parametrize("num_tokens", [5, 40])
def test_shrinkage_comes_before_the_root(num_tokens: int) -> None:
    """With fewer tokens than channels too, where the root alone takes a shortcut."""
    x = torch.randn(2, num_tokens, 16, dtype=torch.float64)
    pooling = Pooling.named("isqrt_cov", reduced_dim=None, shrinkage=0.2)
    shrunk = 0.8 * covariance(x)
    for matrix in shrunk:
        matrix += 0.2 / 16 * matrix.trace() / 0.8 * torch.eye(16)
    wanted = upper_triangle(newton_schulz_sqrt(shrunk, num_iterations=5))
    got = build_pooling(pooling, embed_dim=16)(x)
    torch.testing.assert_close(got, wanted)
    trace = covariance(x).diagonal(dim1=-2, dim2=-1).sum(dim=-1)
    torch.testing.assert_close(shrunk.diagonal(dim1=-2, dim2=-1).sum(dim=-1), trace)


def test_signed_sqrt_keeps_signs_and_has_norm_one() -> None:
    x = torch.tensor([[[4.0, -9.0], [0.0, 1.0]], [[0.0, 0.0], [0.0, 0.0]]])
    x.requires_grad_()
    got = signed_sqrt(x)
    wanted = torch.tensor([[2.0, -3.0], [0.0, 1.0]]) / 14**0.5
    torch.testing.assert_close(got[0], wanted)
    assert torch.equal(got[1], torch.zeros(2, 2))
    (grad,) = torch.autograd.grad(got.sum(), x)
    assert grad.isfinite().all()


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


@pytest.mark.parametrize(
    ("settings", "dim"),
    [
        ({"type": "cross_cov", "reduced_dim": (12, 8)}, 8),
        ({"type": "multi_head", "reduced_dim": 6, "num_heads": 3}, 6),
        ({"type": "cov", "reduced_dim": 12, "num_groups": 2}, 6),
        ({"type": "cov", "reduced_dim": None, "progressive_dims": (20, 10)}, 10),
        ({"type": "gaussian", "reduced_dim": None}, 16),
    ],
)
def test_fewer_tokens_than_the_smaller_dimension_are_warned_of(
    settings: dict[str, Any], dim: int
) -> None:
    pooling = Pooling(**settings)
    with pytest.warns(FewTokensWarning, match=rf"{dim - 1} tokens .* is {dim}:"):
        build_pooling(pooling, embed_dim=16, num_tokens=dim - 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build_pooling(pooling, embed_dim=16, num_tokens=dim)
        build_pooling(pooling, embed_dim=16)
        build_pooling(Pooling(type="avg"), embed_dim=16, num_tokens=1)


@pytest.mark.parametrize("type_", ["cross_cov", "multi_head"])
def test_vector_keeps_the_dtype_of_the_tokens(type_: Any) -> None:
    pool = build_pooling(Pooling(type=type_, reduced_dim=4), embed_dim=16)
    vector = pool.to(torch.bfloat16)(tokens().bfloat16())
    assert vector.dtype == torch.bfloat16
