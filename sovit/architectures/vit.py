"""So-ViT and SoT: vision transformers with a second-order classifier."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.models import checkpoint_seq
from timm.models.vision_transformer import Block
from torch import nn

from sovit.architectures.intermediates import BlockIntermediates
from sovit.architectures.model_args import KeepsArgs
from sovit.architectures.tokens import TOKEN_STRIDE, build_token_embed, check_img_size
from sovit.head import SecondOrderHead
from sovit.pooling import Pooling
from sovit.shapes import Float, Number, Tensor

# Of the sinusoid table's wavelengths.
_BASE = 10000.0


class SoViT(KeepsArgs, BlockIntermediates):
    """Vision transformer with a second-order head.

    So-ViT (arXiv 2104.10935) and its second version, SoT: convolutional token
    embedding, fixed sinusoid positions, pre-norm blocks, one LayerNorm on all tokens,
    and a head that sees the class token and the visual tokens. Arguments are named as
    in timm; `pooling` is the head's, `drop_rate` the dropout on its representation.

    Images are (B, in_chans, *img_size), their sides multiples of `token_stride`, two
    of them at least: 16 pixels as published, or 8 or 4 for as many tokens of small
    images. A covariance of fewer tokens than channels is singular, and warned of.
    Convolutional embeddings of any stride take each other's weights, and positions are
    fitted; a linear one's has another shape. Raises ValueError for settings or images
    that do not fit.
    """

    pos_embed: Tensor
    # What timm's builder leaves on every model it makes.
    pretrained_cfg: dict[str, Any]

    def __init__(
        self,
        *,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 256,
        depth: int = 7,
        num_heads: int = 4,
        mlp_ratio: Number = 2.0,
        qkv_bias: bool = False,
        token_embed: str = "resnet",
        token_stride: int = TOKEN_STRIDE,
        pooling: Pooling | None = None,
        fusion: str = "sum",
        drop_rate: Number = 0.0,
        proj_drop_rate: Number = 0.0,
        attn_drop_rate: Number = 0.0,
        drop_path_rate: Number = 0.0,
    ) -> None:
        super().__init__()
        if depth < 1 or num_heads < 1 or embed_dim % num_heads:
            raise ValueError(
                "expected depth and num_heads of at least 1, embed_dim a multiple of "
                f"num_heads, got depth={depth}, num_heads={num_heads}, "
                f"embed_dim={embed_dim}; change one of them"
            )
        self.patch_embed = build_token_embed(
            token_embed,
            embed_dim=embed_dim,
            in_chans=in_chans,
            token_stride=token_stride,
        )
        self.token_stride = token_stride
        self.img_size = check_img_size(img_size, token_stride=token_stride)
        self.in_chans, self.num_classes = in_chans, num_classes
        self.num_features = self.embed_dim = embed_dim
        self.num_prefix_tokens = 1
        self.grad_checkpointing = False

        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        num_positions = self.grid_size[0] * self.grid_size[1] + 1
        self.register_buffer("pos_embed", sinusoid_table(num_positions, embed_dim))
        norm_layer = partial(nn.LayerNorm, eps=1e-5)
        drop_path_rates = [drop_path_rate * i / max(depth - 1, 1) for i in range(depth)]
        self.blocks = nn.Sequential(
            *(
                Block(
                    embed_dim,
                    num_heads,
                    mlp_ratio=mlp_ratio,
                    qkv_bias=qkv_bias,
                    proj_drop=proj_drop_rate,
                    attn_drop=attn_drop_rate,
                    drop_path=rate,
                    norm_layer=norm_layer,  # pyright: ignore[reportArgumentType]
                )
                for rate in drop_path_rates
            )
        )
        self.norm = norm_layer(embed_dim)
        self.init_weights()
        self.head = SecondOrderHead(
            embed_dim,
            num_classes=num_classes,
            pooling=pooling or Pooling(),
            fusion=fusion,
            drop_rate=drop_rate,
            num_tokens=math.prod(self.grid_size),
        )
        self.head_hidden_size = self.head.num_features
        self.register_load_state_dict_pre_hook(_fit_positions)

    @property
    def grid_size(self) -> tuple[int, int]:
        """Rows and columns of visual tokens."""
        height, width = self.img_size
        return height // self.token_stride, width // self.token_stride

    def init_weights(self) -> None:
        """Draw class token and linear maps of the blocks with deviation 0.02.

        Convolutions of the token embedding keep PyTorch's initialisation.
        """
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        for module in self.blocks.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def no_weight_decay(self) -> set[str]:
        """Return names without weight decay besides vectors and biases.

        The papers decay the class token too. Naming the start vector here keeps it out
        of the decay with tools that decay vectors.
        """
        return {"head.pool.normalize.start"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return the patterns by which timm groups parameters into layers."""
        return {
            "stem": r"^cls_token|pos_embed|patch_embed",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade time for memory: recompute the blocks in the backward pass."""
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module | tuple[nn.Module, ...]:
        """Return the linear classifier, or the two whose logits are added."""
        return self.head.classifier

    def reset_classifier(
        self, num_classes: int, global_pool: str | None = None
    ) -> None:
        """Make new classifiers for `num_classes`; see the head's `reset`."""
        self.head.reset(num_classes, global_pool=global_pool)
        self.num_classes = num_classes
        self.head.to(self.cls_token)

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Change the image size that the model takes, and its position table."""
        self.img_size = check_img_size(img_size, token_stride=self.token_stride)
        self.pos_embed = resize_table(self.pos_embed, grid_size=self.grid_size)

    def embed(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
        """Return the first block's input: class token, tokens, and their positions.

        Raises ValueError for images of another shape.
        """
        x = check_images(x, (self.in_chans, *self.img_size))
        x = self.patch_embed(x)
        cls_token = self.cls_token.expand(x.shape[0], -1, -1)
        x = torch.cat([cls_token, x], dim=1)
        return x + self.pos_embed

    def forward_features(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
        """Return normalised tokens (B, 1 + tokens, embed_dim), class token first."""
        x = self.embed(x)
        if self.grad_checkpointing:
            x = checkpoint_seq(self.blocks, x)
        else:
            x = self.blocks(x)
        return self.norm(x)

    def forward_head(
        self, x: Float[Tensor, "b n d"], pre_logits: bool = False
    ) -> Float[Tensor, "b k"]:
        """Return logits of tokens; with `pre_logits` the vectors before the classifier.

        The latter are (B, head_hidden_size): class token and pooled tokens together.
        """
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        """Return logits (B, num_classes) of images."""
        return self.forward_head(self.forward_features(x))


def check_images(
    x: Float[Tensor, "b c h w"], wanted: tuple[int, int, int]
) -> Float[Tensor, "b c h w"]:
    """Return images of a shape (channels, height, width); ValueError for others."""
    if tuple(x.shape[1:]) != wanted:
        raise ValueError(
            f"expected images of {wanted}, got {tuple(x.shape[1:])}; resize them, or "
            "create the model with img_size=... and in_chans=... of the images"
        )
    return x


# torch.fx knows no shapes: there the check stays one call in the graph.
torch.fx.wrap("check_images")


def _fit_positions(
    model: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any
) -> None:
    """Resize the position table of weights that were trained at another image size."""
    assert isinstance(model, SoViT)
    key = f"{prefix}pos_embed"
    table = state_dict.get(key)
    if table is not None and table.ndim == 3 and table.shape[-1] == model.embed_dim:
        state_dict[key] = resize_table(table, grid_size=model.grid_size)


def sinusoid_table(num_positions: int, dim: int) -> Float[Tensor, "1 p d"]:
    """Compute the fixed position table, (1, num_positions, dim).

    Sine on even channels, cosine on odd ones, wavelengths in a geometric series of base
    10000. Position 0 is the class token and the others number the tokens row by row, so
    rows and columns are not told apart, as in the papers' code.
    """
    if dim % 2:
        raise ValueError(
            f"embed_dim: expected an even number for the sinusoid table, got {dim}; "
            "choose an even one"
        )
    channel = torch.arange(0, dim, 2, dtype=torch.float64)
    frequency = _BASE ** (-channel / dim)
    position = torch.arange(num_positions, dtype=torch.float64)
    angle = position[:, None] * frequency
    table = torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)
    return table.float().unsqueeze(0)


def resize_table(
    table: Float[Tensor, "1 p d"], *, grid_size: tuple[int, int]
) -> Float[Tensor, "1 q d"]:
    """Fit a position table with a class token to a grid of (rows, columns) tokens.

    A sinusoid table is computed anew, which is exact. Any other is interpolated, for
    which its own grid must be a square: ValueError where it is not.
    """
    num_positions = grid_size[0] * grid_size[1] + 1
    old_positions, dim = table.shape[-2:]
    if old_positions == num_positions:
        return table
    if dim % 2 == 0:
        sinusoid = sinusoid_table(old_positions, dim).to(table)
        # Tables computed in float32 elsewhere differ from ours by rounding only.
        if torch.allclose(sinusoid, table, rtol=0, atol=1e-3):
            return sinusoid_table(num_positions, dim).to(table)
    side = math.isqrt(old_positions - 1)
    if side * side != old_positions - 1:
        raise ValueError(
            "expected a position table of a square grid and a class token, got "
            f"{old_positions} positions; interpolate it to {num_positions} positions "
            "before loading"
        )
    return resample_abs_pos_embed(
        table, new_size=list(grid_size), old_size=[side, side], num_prefix_tokens=1
    )
