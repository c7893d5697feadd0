"""Poolings of visual tokens: from (B, N, D) tokens to one vector (B, num_features)."""

from __future__ import annotations

import itertools
import warnings

import torch
from torch import nn

from sovit.drop_cov import ChannelDrop, drop_tokens
from sovit.moment_pool import MomentPool
from sovit.moments import append_one, cross_covariance, upper_triangle
from sovit.normalize import Normalize
from sovit.pooling_settings import METHODS, SYMMETRIC_TYPES, Pooling, as_pooling
from sovit.shapes import Float, Tensor

# Calls in a graph of torch.fx, which sees neither shapes nor devices.
for _name in ("cross_covariance", "upper_triangle"):
    torch.fx.wrap(_name)

__all__ = [
    "METHODS",
    "AvgPool",
    "CovPool",
    "CrossCovPool",
    "FewTokensWarning",
    "MomentPool",
    "MultiHeadPool",
    "Pooling",
    "as_pooling",
    "build_pooling",
]


class AvgPool(nn.Module):
    """Mean of the tokens: the first-order baseline."""

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.num_features = embed_dim

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b d"]:
        """Return the mean token."""
        return x.mean(dim=1)


class Reduction(nn.Module):
    """Reduction of tokens by a linear map without bias, BatchNorm and an activation.

    The same as a 1x1 convolution, BatchNorm and ReLU on a feature map.
    """

    def __init__(self, in_dim: int, out_dim: int, *, act_layer: str = "relu") -> None:
        super().__init__()
        self.linear = nn.Linear(in_dim, out_dim, bias=False)
        self.norm = nn.BatchNorm1d(out_dim)
        self.act = nn.ReLU6() if act_layer == "relu6" else nn.ReLU()
        nn.init.normal_(self.linear.weight, std=(2.0 / out_dim) ** 0.5)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n k"]:
        """Return the narrower tokens."""
        narrow = self.act(self.norm(self.linear(x).flatten(0, 1)))
        return narrow.unflatten(0, x.shape[:2])


class CovPool(nn.Module):
    """Pooling of tokens into the normalised covariance of narrower ones.

    MPN-COV (arXiv 1703.08050), iSQRT-COV (arXiv 1712.01034) and their journal version
    (arXiv 1904.06836): 1x1 reduction, possibly in several steps (`progressive_dims`),
    covariance, power, upper triangle with the diagonal; elements off the diagonal are
    not scaled by sqrt(2), as in the released code. Group convolution's compression is
    `num_groups`: a covariance for each group of channels. With `type="gaussian"` the
    matrix is [[S + m m^T, m], [m^T, 1]] of each group's mean m and covariance S.
    """

    def __init__(self, embed_dim: int, *, pooling: Pooling) -> None:
        super().__init__()
        self.pooling = pooling
        dims = [embed_dim, *pooling.progressive_dims]
        if isinstance(pooling.reduced_dim, int):
            dims.append(pooling.reduced_dim)
        width, num_groups = dims[-1], pooling.num_groups
        if width % num_groups:
            raise ValueError(
                f"num_groups: expected a divisor of the {width} channels that are "
                f"pooled, got {num_groups}; choose a divisor, or set reduced_dim"
            )
        self.reduction = nn.Sequential(
            *(
                Reduction(in_dim, out_dim, act_layer=pooling.act_layer)
                for in_dim, out_dim in itertools.pairwise(dims)
            )
        )
        self.channel_drop = nn.Identity()
        if pooling.channel_drop:
            self.channel_drop = ChannelDrop(width, rate=pooling.channel_drop)
        side = width // num_groups + (pooling.type == "gaussian")
        self.normalize = Normalize(side, pooling=pooling)
        self.num_features = num_groups * side * (side + 1) // 2

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b f"]:
        """Return the upper triangles, group by group, in the dtype of the tokens."""
        tokens = self.channel_drop(self.reduction(x))
        tokens = tokens.unflatten(-1, (self.pooling.num_groups, -1)).transpose(1, 2)
        if self.training and self.pooling.token_drop:
            (tokens,) = drop_tokens((tokens,), rate=self.pooling.token_drop)
        if self.pooling.type == "gaussian":
            matrix = self.normalize.covariance(append_one(tokens), centering="none")
        else:
            centering = self.pooling.centering
            matrix = self.normalize.covariance(tokens, centering=centering)
        return upper_triangle(matrix).flatten(1).to(x.dtype)


def split_views(
    x: Float[Tensor, "b n views"], *, pooling: Pooling
) -> tuple[Float[Tensor, "b heads n first"], Float[Tensor, "b heads n second"]]:
    """Split reduced tokens into the two views of every head.

    The first views of all heads come before the second ones.
    """
    num_heads = pooling.num_heads
    views = x.split([num_heads * dim for dim in pooling.reduced_dims], dim=-1)
    # Not by iterating: torch.fx sees no length.
    first, second = views[0], views[1]
    first = first.unflatten(-1, (num_heads, -1)).transpose(1, 2)
    return first, second.unflatten(-1, (num_heads, -1)).transpose(1, 2)


class CrossCovPool(nn.Module):
    """Pooling of tokens into the normalised cross-covariance of two narrow views.

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
        if self.training and self.pooling.token_drop:
            first, second = drop_tokens((first, second), rate=self.pooling.token_drop)
        matrix = cross_covariance(second, first, centering=self.pooling.centering)
        return self.normalize(matrix).mT.flatten(1).to(x.dtype)


class MultiHeadPool(nn.Module):
    """Pooling of tokens into several small normalised cross-covariances.

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
        """Draw the linear map's weights like all others of the model."""
        nn.init.trunc_normal_(self.reduction.weight, std=0.02)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b f"]:
        """Return the flattened matrices, head by head, in the dtype of the tokens."""
        first, second = split_views(self.reduction(x), pooling=self.pooling)
        if self.training and self.pooling.token_drop:
            first, second = drop_tokens((first, second), rate=self.pooling.token_drop)
        matrix = cross_covariance(first, second, centering=self.pooling.centering)
        return self.normalize(matrix).flatten(1).to(x.dtype)


class FewTokensWarning(UserWarning):
    """Warning of a pooling with fewer tokens than its smaller dimension."""


def build_pooling(
    pooling: Pooling, *, embed_dim: int, num_tokens: int | None = None
) -> AvgPool | CovPool | CrossCovPool | MomentPool | MultiHeadPool:
    """Build the pooling of some settings for tokens of `embed_dim` channels.

    Warns with `FewTokensWarning` where `num_tokens`, if known, are too few.
    """
    if num_tokens is not None:
        warn_of_few_tokens(pooling, embed_dim=embed_dim, num_tokens=num_tokens)
    if pooling.type == "avg":
        return AvgPool(embed_dim)
    if pooling.type == "multi_head":
        return MultiHeadPool(embed_dim, pooling=pooling)
    if pooling.type == "cross_cov":
        return CrossCovPool(embed_dim, pooling=pooling)
    if pooling.type == "moment":
        return MomentPool(embed_dim, pooling=pooling)
    return CovPool(embed_dim, pooling=pooling)


def warn_of_few_tokens(pooling: Pooling, *, embed_dim: int, num_tokens: int) -> None:
    """Warn where `num_tokens` are so few that the matrix is always singular."""
    dim = smaller_dim(pooling, embed_dim=embed_dim)
    if num_tokens >= dim:
        return
    centred = pooling.type != "gaussian" and pooling.centering == "channel"
    if num_tokens == 1 and centred:
        harm = "that of one token is 0 for every image, so the head learns nothing"
    else:
        harm = (
            "fewer tokens leave it without full rank, and the head may do worse than "
            "the class token or a mean"
        )
    warnings.warn(
        f"the covariance of {num_tokens} token{'s' * (num_tokens != 1)} is pooled, and "
        f"its smaller dimension is {dim}: {harm}. Take larger images, a smaller "
        "token_stride (8 or 4) where the model has one, or a smaller reduced_dim.",
        FewTokensWarning,
        stacklevel=2,
    )


def smaller_dim(pooling: Pooling, *, embed_dim: int) -> int:
    """Return the smaller side of the matrices; 1 where no power of one is taken."""
    if pooling.type in ("avg", "moment"):
        return 1
    if pooling.type not in SYMMETRIC_TYPES:
        return min(pooling.reduced_dims)
    dims = (embed_dim, *pooling.progressive_dims, pooling.reduced_dim)
    width = [dim for dim in dims if isinstance(dim, int)][-1]
    return width // pooling.num_groups
