"""Poolings of visual tokens: from (B, N, D) tokens to one vector (B, num_features)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args, no_type_check

import torch
from torch import nn

from sovit.moments import CENTERINGS, cross_covariance
from sovit.shapes import Float, Number, Tensor
from sovit.svpn import svpn

PoolingType = Literal["cross_cov", "multi_head", "avg"]
Normalizer = Literal["svpn", "none"]
Start = Literal["learned", "ones"]


@dataclass(frozen=True, kw_only=True)
class Pooling:
    """Say how visual tokens become one vector. Raises ValueError for bad settings."""

    type: PoolingType = "cross_cov"
    """"cross_cov" is So-ViT's, "multi_head" SoT's, "avg" the mean of the tokens, which
    uses none of the other settings."""

    reduced_dim: int | tuple[int, int] = (48, 24)
    """Channels of the two sides of the cross-covariance; of each head with many."""

    num_heads: int = 1
    """Cross-covariances side by side."""

    centering: Literal["channel", "scalar", "none"] = "channel"
    """The mean taken off before: see `sovit.moments.center`."""

    normalizer: Normalizer = "svpn"
    """"svpn" takes a power of the singular values (`sovit.svpn.svpn`)."""

    power: Number = 0.5
    num_iterations: int = 1
    num_singular_values: int | None = 1
    """None takes all of them."""

    start: Start = "learned"
    """The start of the power iteration: a trained vector or fixed ones."""

    def __post_init__(self) -> None:
        """Refuse settings that no pooling can have."""
        for name, wanted in _CHOICES.items():
            _check(self, name, getattr(self, name) in wanted, f"one of {wanted}")
        if isinstance(self.reduced_dim, list):
            # Settings that were kept as JSON come back with lists.
            object.__setattr__(self, "reduced_dim", tuple(self.reduced_dim))
        dims = self.reduced_dim
        pair = dims if isinstance(dims, tuple) else (dims, dims)
        fits = len(pair) == 2 and all(_is_count(dim) for dim in pair)
        _check(self, "reduced_dim", fits, "a positive integer or a pair of them")
        for name in ("num_heads", "num_iterations"):
            _check(self, name, _is_count(getattr(self, name)), "a positive integer")
        _check(self, "power", 0 < self.power <= 1, "over 0 and at most 1")
        count = self.num_singular_values
        fits = count is None or (_is_count(count) and count <= min(pair))
        wanted = f"from 1 to the smaller reduced_dim, {min(pair)}, or None for all"
        _check(self, "num_singular_values", fits, wanted)

    @property
    def reduced_dims(self) -> tuple[int, int]:
        """Return `reduced_dim` as a pair."""
        dims = self.reduced_dim
        return (dims, dims) if isinstance(dims, int) else (dims[0], dims[1])

    def changed(self, fields: Mapping[str, Any]) -> Pooling:
        """Return these settings with some fields changed, or raise ValueError."""
        known = [field.name for field in dataclasses.fields(self)]
        unknown = sorted(set(fields) - set(known))
        if unknown:
            raise ValueError(
                f"Pooling has the fields {known}, got {unknown}: check the spelling."
            )
        return dataclasses.replace(self, **fields)


_CHOICES = {
    "type": get_args(PoolingType),
    "centering": CENTERINGS,
    "normalizer": get_args(Normalizer),
    "start": get_args(Start),
}


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _check(pooling: Pooling, name: str, fits: bool, wanted: str) -> None:
    if not fits:
        raise ValueError(
            f"Pooling.{name} must be {wanted}, got {getattr(pooling, name)!r}: "
            f"set pooling={{'{name}': ...}} to such a value."
        )


# A checker of annotations would refuse a bad setting before its reason can be told.
no_type_check(Pooling.__init__)


class AvgPool(nn.Module):
    """Average the tokens: the first-order pooling to compare with."""

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.num_features = embed_dim

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b d"]:
        """Return the mean token."""
        return x.mean(dim=1)


class Normalize(nn.Module):
    """Apply the chosen normalisation to matrices whose last dimension is `dim`.

    The learned start vector is N(0, 1) at first and shared by all heads.
    """

    start: Tensor | None

    def __init__(self, dim: int, *, pooling: Pooling) -> None:
        super().__init__()
        self.pooling = pooling
        if pooling.normalizer == "none":
            self.start = None
        elif pooling.start == "learned":
            self.start = nn.Parameter(torch.randn(dim))
        else:
            self.register_buffer("start", torch.ones(dim), persistent=False)

    def forward(self, x: Float[Tensor, "*batch m n"]) -> Float[Tensor, "*batch m n"]:
        """Return the normalised matrices."""
        if self.start is None:
            return x
        return svpn(
            x,
            self.start,
            power=self.pooling.power,
            num_iterations=self.pooling.num_iterations,
            num_singular_values=self.pooling.num_singular_values,
        )


def split_views(
    x: Float[Tensor, "b n views"], *, pooling: Pooling
) -> tuple[Float[Tensor, "b heads n first"], Float[Tensor, "b heads n second"]]:
    """Split reduced tokens into the two views of every head.

    The first views of all heads come before the second ones.
    """
    num_heads = pooling.num_heads
    views = x.split([num_heads * dim for dim in pooling.reduced_dims], dim=-1)
    first, second = (view.unflatten(-1, (num_heads, -1)) for view in views)
    return first.transpose(1, 2), second.transpose(1, 2)


class CrossCovPool(nn.Module):
    """Pool tokens into the normalised cross-covariance of two narrow views of them.

    So-ViT (arXiv 2104.10935), section 3, which has one head: each view is a 1x1
    convolution, BatchNorm and ReLU. All views are one linear map and one BatchNorm
    here, which is the same. As in the papers' code the start vector meets the first
    view, and the vector is that of the (first, second) matrix, row by row.
    """

    def __init__(self, embed_dim: int, *, pooling: Pooling) -> None:
        super().__init__()
        self.pooling = pooling
        first, second = pooling.reduced_dims
        width = pooling.num_heads * (first + second)
        self.reduction = nn.Linear(embed_dim, width, bias=False)
        self.norm = nn.BatchNorm1d(width)
        self.normalize = Normalize(first, pooling=pooling)
        self.num_features = pooling.num_heads * first * second
        self.init_weights()

    def init_weights(self) -> None:
        """Draw each view's weights as He normal by its own fan-out, as released."""
        dims = [self.pooling.num_heads * dim for dim in self.pooling.reduced_dims]
        for weight in self.reduction.weight.split(dims):
            nn.init.normal_(weight, std=(2.0 / weight.shape[0]) ** 0.5)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b f"]:
        """Return the flattened matrices, head by head, in the dtype of the tokens."""
        reduced = self.norm(self.reduction(x).flatten(0, 1)).relu()
        reduced = reduced.unflatten(0, x.shape[:2])
        first, second = split_views(reduced, pooling=self.pooling)
        matrix = cross_covariance(second, first, centering=self.pooling.centering)
        return self.normalize(matrix).mT.flatten(1).to(x.dtype)


class MultiHeadPool(nn.Module):
    """Pool tokens into several small normalised cross-covariances, side by side.

    SoT (arXiv 2104.10935v2), multi-head global cross-covariance pooling: one linear
    map without bias, norm or activation gives every head its two views. The start
    vector meets the second view. SoT's weights need `centering="scalar"`.
    """

    def __init__(self, embed_dim: int, *, pooling: Pooling) -> None:
        super().__init__()
        self.pooling = pooling
        first, second = pooling.reduced_dims
        width = pooling.num_heads * (first + second)
        self.reduction = nn.Linear(embed_dim, width, bias=False)
        self.normalize = Normalize(second, pooling=pooling)
        self.num_features = pooling.num_heads * first * second
        self.init_weights()

    def init_weights(self) -> None:
        """Draw the linear map's weights as every other one's of the model."""
        nn.init.trunc_normal_(self.reduction.weight, std=0.02)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b f"]:
        """Return the flattened matrices, head by head, in the dtype of the tokens."""
        first, second = split_views(self.reduction(x), pooling=self.pooling)
        matrix = cross_covariance(first, second, centering=self.pooling.centering)
        return self.normalize(matrix).flatten(1).to(x.dtype)


def build_pooling(
    pooling: Pooling, *, embed_dim: int
) -> AvgPool | CrossCovPool | MultiHeadPool:
    """Build the module of some settings for tokens of `embed_dim` channels."""
    if pooling.type == "avg":
        return AvgPool(embed_dim)
    if pooling.type == "multi_head":
        return MultiHeadPool(embed_dim, pooling=pooling)
    return CrossCovPool(embed_dim, pooling=pooling)
