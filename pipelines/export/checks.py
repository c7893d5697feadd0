"""Check exported models against the original: the largest difference of logits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

RANDOM, IMAGES = "random pixels", "images"
# One, since a graph may be fixed to more; three, since it was traced with two.
_RANDOM_BATCHES = (1, 3)
_IMAGES_PER_BATCH = 8


@dataclass(frozen=True, kw_only=True)
class Cases:
    """Batches of pixels with the model's logits for them."""

    batches: Mapping[str, Sequence[tuple[Tensor, Tensor]]]
    num_images: int
    """How many of them are of real images."""


@torch.no_grad()
def make_cases(
    model: nn.Module, *, img_size: int, images: Sequence[Tensor] = ()
) -> Cases:
    """Build batches of fixed random pixels, and of images (3, H, W).

    Raises ValueError if the model's logits are not finite.
    """
    generator = torch.Generator().manual_seed(0)
    batches = {
        RANDOM: [
            torch.randn(num, 3, img_size, img_size, generator=generator)
            for num in _RANDOM_BATCHES
        ]
    }
    if images:
        batches[IMAGES] = list(torch.stack(list(images)).split(_IMAGES_PER_BATCH))
    cases = {
        kind: [(pixels, model(pixels)) for pixels in of_kind]
        for kind, of_kind in batches.items()
    }
    for kind, pairs in cases.items():
        if not all(logits.isfinite().all() for _, logits in pairs):
            raise ValueError(
                "expected a model whose logits are numbers, got NaN or infinite ones "
                f"on {kind}; export an earlier checkpoint"
            )
    return Cases(batches=cases, num_images=len(images))


@torch.no_grad()
def check(
    name: str, run: Callable[[Tensor], Tensor], *, cases: Cases, tolerance: float
) -> dict[str, float]:
    """Measure the largest difference from the model's logits for each kind of batch.

    Allowed is `tolerance` times the largest logit of that kind, or times 1 where that
    is smaller. Raises ValueError, naming the file, above that.
    """
    found = {}
    for kind, batches in cases.batches.items():
        pairs = [(run(pixels), wanted) for pixels, wanted in batches]
        largest = max(wanted.abs().max().item() for _, wanted in pairs)
        difference = max((got - wanted).abs().max().item() for got, wanted in pairs)
        allowed = tolerance * max(largest, 1.0)
        if not difference <= allowed:  # NaN too
            raise ValueError(
                f"{name}: expected the model's logits within {allowed:.1e}, got a "
                f"difference of {difference:.1e} on {kind} (largest logit "
                f"{largest:.3g}); nothing was written, leave this format out by "
                "--formats, or allow more by --tolerance"
            )
        found[kind] = difference
    return found
