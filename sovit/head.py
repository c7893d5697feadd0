"""The classifier of So-ViT: class token and pooled visual tokens, fused late."""

from __future__ import annotations

import torch
from torch import nn

from sovit.pooling import Pooling, build_pooling
from sovit.shapes import Float, Number, Tensor

FUSIONS = ("sum", "mean", "concat", "class", "visual")


def classifier_names(fusion: str) -> tuple[str, ...]:
    """Return the names of the linear classifiers in a head of some fusion."""
    if fusion not in FUSIONS:
        raise ValueError(
            f"fusion: expected one of {FUSIONS}, got {fusion!r}; 'sum' is the papers' "
            "choice"
        )
    both = ("fc_class", "fc_visual")
    names = {"sum": both, "mean": both, "concat": ("fc",)}
    return names.get(fusion, (f"fc_{fusion}",))


class SecondOrderHead(nn.Module):
    """Classifier of the class token, the pooled visual tokens, or both.

    So-ViT (arXiv 2104.10935), section 3. `fusion` is one of

    - "sum": two linear classifiers, their logits added (the papers' choice);
    - "mean": the same, their logits averaged (Moment Probing's);
    - "concat": one linear classifier on both vectors;
    - "class": the class token alone; "visual": the pooled visual tokens alone.

    The tokens' first `num_prefix_tokens` are not visual; the very first is the class
    token. `drop_rate` is the dropout on the pooled visual tokens, and on the class
    token where there is nothing else. `num_features` is the length of what `pre_logits`
    returns. Of `num_tokens` visual tokens, where that is known, too few are warned of.
    """

    def __init__(
        self,
        embed_dim: int,
        *,
        num_classes: int = 1000,
        pooling: Pooling,
        fusion: str = "sum",
        drop_rate: Number = 0.0,
        num_prefix_tokens: int = 1,
        num_tokens: int | None = None,
    ) -> None:
        super().__init__()
        if fusion != "visual" and not num_prefix_tokens:
            raise ValueError(
                f"fusion={fusion!r}: expected a class token, got tokens without one; "
                "choose 'visual'"
            )
        self.num_prefix_tokens = num_prefix_tokens
        self.fusion, self.classifier_names = fusion, classifier_names(fusion)
        self.class_dim = 0 if fusion == "visual" else embed_dim
        self.pool = None
        if fusion != "class":
            self.pool = build_pooling(
                pooling, embed_dim=embed_dim, num_tokens=num_tokens
            )
        self.visual_dim = self.pool.num_features if self.pool else 0
        self.num_features = self.class_dim + self.visual_dim
        self.drop = nn.Dropout(drop_rate)
        self.reset(num_classes)

    def reset(self, num_classes: int, *, global_pool: str | None = None) -> None:
        """Make new classifiers for `num_classes`; none with 0.

        `global_pool` exists for timm's tools and must be None: the pooling is chosen
        when the model is built.
        """
        if global_pool is not None:
            raise ValueError(
                f"global_pool: expected None, got {global_pool!r}; create the model "
                "with pooling={...} or fusion=... instead"
            )
        if num_classes < 0:
            raise ValueError(
                f"num_classes: expected at least 0, got {num_classes}; give 0 for a "
                "model without classifier"
            )
        self.num_classes = num_classes
        dims = {
            "fc": self.num_features,
            "fc_class": self.class_dim,
            "fc_visual": self.visual_dim,
        }
        old = next(self.parameters(), None)
        for name in self.classifier_names:
            layer: nn.Module = nn.Identity()
            if num_classes:
                layer = nn.Linear(dims[name], num_classes)
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
            if old is not None:
                layer.to(device=old.device, dtype=old.dtype)
            setattr(self, name, layer.train(self.training))

    def classifiers(self) -> tuple[nn.Module, ...]:
        """Return the classifiers, in the order of `classifier_names`."""
        return tuple(getattr(self, name) for name in self.classifier_names)

    @property
    def classifier(self) -> nn.Module | tuple[nn.Module, ...]:
        """The linear classifier, or the two whose logits are added."""
        first, *others = self.classifiers()
        return (first, *others) if others else first

    def represent(self, x: Float[Tensor, "b n d"]) -> tuple[Tensor | None, ...]:
        """Return the class vector and the visual vector; None for one not used."""
        class_vector = visual_vector = None
        if self.class_dim:
            class_vector = x[:, 0]
        if self.pool is not None:
            visual_vector = self.drop(self.pool(x[:, self.num_prefix_tokens :]))
        elif class_vector is not None:
            class_vector = self.drop(class_vector)
        return class_vector, visual_vector

    def forward(
        self, x: Float[Tensor, "b n d"], *, pre_logits: bool = False
    ) -> Float[Tensor, "b k"]:
        """Return logits of tokens, whose first is the class token if there is one.

        With `pre_logits`, or without classes, return the vectors that the classifiers
        see, concatenated: (B, num_features).
        """
        used = [vector for vector in self.represent(x) if vector is not None]
        if pre_logits or not self.num_classes:
            return torch.cat(used, dim=-1)
        if self.fusion == "concat":
            used = [torch.cat(used, dim=-1)]
        first, *others = (
            fc(vector) for fc, vector in zip(self.classifiers(), used, strict=True)
        )
        if not others:
            return first
        return (first + others[0]) / (2 if self.fusion == "mean" else 1)
