"""timm's interface to features inside a network: `forward_intermediates` and its kin.

Arguments are timm's, in names and order, so that its feature extractors accept our
networks like its own: `timm.create_model(name, features_only=True)`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from timm.models import checkpoint
from timm.models._features import feature_take_indices
from torch import nn

from sovit.head import SecondOrderHead
from sovit.pooling import Pooling
from sovit.shapes import Float, Tensor

Indices = int | list[int] | tuple[int, ...] | None
FORMATS = ("NCHW", "NLC")


def plain_head(old: SecondOrderHead, *, embed_dim: int) -> SecondOrderHead:
    """Return a head without parameters: the class token, or the mean of the others."""
    return SecondOrderHead(
        embed_dim,
        num_classes=0,
        pooling=Pooling.named("avg"),
        fusion="class" if old.class_dim else "visual",
        num_prefix_tokens=old.num_prefix_tokens,
    ).train(old.training)


class BlockIntermediates(nn.Module):
    """Features after the blocks of a transformer whose first token is the class's."""

    blocks: nn.Sequential
    norm: nn.Module
    head: SecondOrderHead
    embed_dim: int
    head_hidden_size: int
    num_classes: int
    img_size: tuple[int, int]
    token_stride: int
    grad_checkpointing: bool
    embed: Callable[[Tensor], Tensor]

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """Each block's module, channels and reduction: pixels per token."""
        return [
            {
                "module": f"blocks.{i}",
                "num_chs": self.embed_dim,
                "reduction": self.token_stride,
            }
            for i in range(len(self.blocks))
        ]

    def forward_intermediates(
        self,
        x: Float[Tensor, "b c h w"],
        indices: Indices = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
    ) -> Any:
        """Return final tokens and those after some blocks, as timm's ViT does.

        Args:
            x: Images.
            indices: The number of last blocks, or a list of blocks, negative ones from
                the end; None takes all.
            return_prefix_tokens: Return pairs (visual tokens, class token).
            norm: Apply the last norm to each.
            stop_early: Compute no block after the last wanted.
            output_fmt: "NCHW" for maps (B, D, H, W), "NLC" for tokens (B, N, D).
            intermediates_only: Leave the final tokens out.
            output_dict: Return a dictionary with timm's names instead.
        """
        if output_fmt not in FORMATS:
            raise ValueError(
                f"output_fmt: expected one of {FORMATS}, got {output_fmt!r}; NCHW "
                "gives maps"
            )
        wanted, last = feature_take_indices(len(self.blocks), _as_list(indices))
        x, found = self.embed(x), []
        for i, block in enumerate(
            self.blocks[: last + 1] if stop_early else self.blocks
        ):
            x = checkpoint(block, x) if self.grad_checkpointing else block(x)
            if i in wanted:
                found.append(self.norm(x) if norm else x)
        prefix, maps = [y[:, :1] for y in found], [y[:, 1:] for y in found]
        if output_fmt == "NCHW":
            grid = [side // self.token_stride for side in self.img_size]
            maps = [y.mT.unflatten(2, grid).contiguous() for y in maps]
        if output_dict:
            named: dict[str, Any] = {"image_intermediates": maps}
            if return_prefix_tokens:
                named["image_intermediates_prefix"] = prefix
            return (
                named
                if intermediates_only
                else {**named, "image_features": self.norm(x)}
            )
        pairs = list(zip(maps, prefix, strict=True)) if return_prefix_tokens else maps
        return pairs if intermediates_only else (self.norm(x), pairs)

    def get_intermediate_layers(
        self,
        x: Float[Tensor, "b c h w"],
        n: Indices = 1,
        reshape: bool = False,
        return_prefix_tokens: bool = False,
        norm: bool = False,
    ) -> Any:
        """Return tokens after some blocks, or with `reshape` maps: DINO's interface."""
        return self.forward_intermediates(
            x,
            n,
            return_prefix_tokens=return_prefix_tokens,
            norm=norm,
            output_fmt="NCHW" if reshape else "NLC",
            intermediates_only=True,
        )

    def prune_intermediate_layers(
        self, indices: Indices = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what some blocks' features do not need; return the blocks' numbers.

        Without its head the network returns the class token, or the mean of the others.
        """
        wanted, last = feature_take_indices(len(self.blocks), _as_list(indices))
        self.blocks = self.blocks[: last + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.head = plain_head(self.head, embed_dim=self.embed_dim)
            self.num_classes, self.head_hidden_size = 0, self.embed_dim
        return wanted


class TrunkIntermediates(nn.Module):
    """Features of a timm trunk, by its own methods."""

    backbone: Any
    head: SecondOrderHead
    hidden: nn.Sequential
    embed_dim: int
    num_features: int
    head_hidden_size: int
    num_classes: int

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """The trunk's features, their modules' names below `backbone.`."""
        return [
            {**info, "module": f"backbone.{info['module']}"}
            for info in self.backbone.feature_info
        ]

    def forward_intermediates(
        self, x: Float[Tensor, "b c h w"], indices: Indices = None, **kwargs: Any
    ) -> Any:
        """Return the trunk's features and those of some stages or blocks.

        Arguments are those of the trunk's own method.
        """
        method = self.backbone.forward_intermediates
        return method(x, indices=_as_list(indices), **kwargs)

    @property
    def get_intermediate_layers(self) -> Callable[..., Any]:
        """The trunk's method of that name; AttributeError where it has none."""
        return self.backbone.get_intermediate_layers

    def prune_intermediate_layers(
        self, indices: Indices = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what some features do not need; return their numbers.

        The head goes too where the features that it was made for are gone. Without it
        the network returns the class token, or the mean of the positions.
        """
        taken = self.backbone.prune_intermediate_layers(
            _as_list(indices), prune_norm=prune_norm, prune_head=prune_head
        )
        num_chs = self.backbone.num_features
        if prune_head or num_chs != self.embed_dim:
            self.head = plain_head(self.head, embed_dim=num_chs)
            self.hidden = nn.Sequential()
            self.num_classes = 0
            self.embed_dim = self.num_features = self.head_hidden_size = num_chs
        return taken


def _as_list(indices: Indices) -> int | list[int] | None:
    return list(indices) if isinstance(indices, tuple) else indices
