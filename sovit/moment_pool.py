"""Moment head: cross-moments of neighbouring heads, shortened by two convolutions."""

from __future__ import annotations

from torch import nn
from torch.nn import functional

from sovit.moments import cross_covariance
from sovit.pooling_settings import Pooling
from sovit.shapes import Float, Tensor

# A column shorter than this is shortened no further: LayerNorm's output is about 1.
_EPS = 1e-6


class MomentPool(nn.Module):
    """Pooling of tokens into cross-moments of neighbouring heads, convolved twice.

    Moment Probing (ICCV 2023) for frozen backbones: a linear map with bias to
    `num_heads` heads of `reduced_dim` channels, one LayerNorm for all of them,
    M_i = H_i^T H_(i+1) / N, each column scaled to length 1, two 3x3 convolutions of
    stride 2 with GELU, flattened. Its logits are the mean of these features' and of the
    class token's: `fusion="mean"`. `num_heads` other than 4, which fail in the released
    code, give `num_heads` - 1 matrices. Published parameters leave the linear map out.
    """

    def __init__(self, embed_dim: int, *, pooling: Pooling) -> None:
        super().__init__()
        self.pooling = pooling
        num_heads, dim = pooling.num_heads, pooling.reduced_dims[0]
        num_pairs = num_heads - 1
        self.reduction = nn.Linear(embed_dim, num_heads * dim)
        self.norm = nn.LayerNorm(dim)
        self.shorten = nn.Sequential(
            nn.Conv2d(num_pairs, num_pairs, 3, stride=2, bias=False),
            nn.GELU(),
            nn.Conv2d(num_pairs, num_pairs, 3, stride=2, bias=False),
            nn.GELU(),
        )
        for _ in range(2):
            dim = (dim - 3) // 2 + 1
        self.num_features = num_pairs * dim * dim
        self.init_weights()

    def init_weights(self) -> None:
        """Draw all weights as released: a truncated normal of 0.02, biases zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(self.reduction.bias)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b f"]:
        """Return the shortened moments, flattened, in the dtype of the tokens."""
        tokens = self.reduction(x).unflatten(-1, (self.pooling.num_heads, -1))
        heads = self.norm(tokens).transpose(1, 2)
        moments = cross_covariance(
            heads[:, :-1], heads[:, 1:], centering=self.pooling.centering
        )
        columns = functional.normalize(moments, dim=-2, eps=_EPS)
        shortened = self.shorten(columns.to(self.reduction.weight.dtype))
        return shortened.flatten(1).to(x.dtype)
