"""Dropout before a covariance: DropCov's adaptive channels, and whole tokens."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import nn
from torch.nn import functional

from sovit.moments import center
from sovit.precision import TINY, at_least_float32, autocast_off
from sovit.shapes import Float, Number, Tensor

# A call in a graph of torch.fx, which sees no shapes.
for _name in ("drop_channels", "drop_rates", "drop_tokens"):
    torch.fx.wrap(_name)

# Of the papers' code; the source of the number is not known.
_SLOPE = 10.0
# All channels gone would leave a covariance of zero.
_MOST = 0.9


class ChannelDrop(nn.Module):
    """Dropout of whole channels before a covariance, in training only.

    DropCov (NeurIPS 2022), as its ResNets have it: a convolution over the channels'
    means and a softmax weigh the channels, x (1 + w), and the closer these weights are
    to the channels' sums of covariances, the fewer channels are dropped,
    p = 1 - 10 / log2(d) cos. The covariance's diagonal becomes 1 / (1 - p) of itself in
    the mean, all else stays: a shrinkage of correlations in place of a root.

    `rate` is "batch", one p for all images that this process sees at a time as in the
    papers' code, "image", one for each, which no number of workers changes, or a fixed
    number. p is a tensor, never waited for, and at most 0.9, where the code allows 1.
    """

    def __init__(self, dim: int, *, rate: Number | Literal["batch", "image"]) -> None:
        super().__init__()
        self.rate = rate
        self.conv = None
        if isinstance(rate, str):
            if dim < 2:
                raise ValueError(
                    f"channel_drop={rate!r}: expected at least 2 channels, got {dim}; "
                    "set reduced_dim, or give channel_drop a number"
                )
            self.conv = nn.Conv1d(1, 1, 3, padding=1, bias=False)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        """Return the tokens with the channels that are left, scaled by 1 / (1 - p)."""
        if not self.training:
            return x
        if self.conv is None or not isinstance(self.rate, str):
            return drop_channels(x, float(self.rate))
        means = x.mean(dim=1)
        weights = self.conv(means.unsqueeze(1)).squeeze(1).softmax(dim=-1)
        x = x * (1 + weights.unsqueeze(1)).to(x.dtype)
        return drop_channels(x, drop_rates(x, weights, per_image=self.rate == "image"))


def drop_rates(
    x: Float[Tensor, "b n d"], weights: Float[Tensor, "b d"], *, per_image: bool
) -> Float[Tensor, "b 1 1"]:
    """Return DropCov's drop rates of images; no gradient goes through them.

    p = 1 - 10 / log2(d) cos(w, r), between 0 and 0.9, with r the row sums of the
    covariance of x, which take N d products and no matrix. Of zero tokens cos is 0.
    """
    with torch.no_grad(), autocast_off(x.device.type):
        centred = center(at_least_float32(x.detach()), centering="channel")
        sums = centred.sum(dim=-1, keepdim=True)
        rows = (centred * sums).mean(dim=1)
        agreement = functional.cosine_similarity(
            at_least_float32(weights.detach()), rows, dim=-1, eps=TINY
        )
        if not per_image:
            agreement = agreement.mean().expand(agreement.shape)
        rates = 1 - _SLOPE / math.log2(x.shape[-1]) * agreement
        return rates.clamp(0, _MOST)[:, None, None]


def drop_channels(
    x: Float[Tensor, "b n d"], rate: Number | Float[Tensor, "b 1 1"]
) -> Float[Tensor, "b n d"]:
    """Set random channels of each image to zero, and scale the others up."""
    draws = torch.rand(x.shape[0], 1, x.shape[2], device=x.device)
    return x * ((draws >= rate) / (1 - rate)).to(x.dtype)


def drop_tokens(
    views: tuple[Float[Tensor, "*heads n _"], ...], *, rate: Number
) -> tuple[Float[Tensor, "*heads n _"], ...]:
    """Set random tokens of each head to zero, the same in all views; scale the others.

    DropCov's transformers do this, at a rate of 0.2, which their name for it hides.
    """
    kept = functional.dropout(torch.ones_like(views[0][..., :1]), rate)
    return tuple(view * kept for view in views)
