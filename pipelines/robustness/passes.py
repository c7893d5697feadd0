"""Run a model over corrupted batches and over sequences of perturbed ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from pipelines.data.batch import Batch
from pipelines.robustness.corruptions import Corruption, corrupt
from pipelines.robustness.digital import through_jpeg
from pipelines.robustness.perturbations import NOISES, Perturbation, frames
from pipelines.training.metrics import correct
from pipelines.training.step import Forward
from pipelines.transforms.normalize import Levels

Condition = tuple[Corruption, int]
"""A corruption and its severity."""


@dataclass(frozen=True, kw_only=True)
class Pass:
    """A model with what a pass over images needs."""

    model: nn.Module
    forward: Forward
    levels: Levels
    """Of the model's images."""
    seed: int
    threads: ThreadPoolExecutor
    on_images: Callable[[int], object] = lambda num: None
    """Callback with how many more images the model has seen."""

    def logits(self, pixels: np.ndarray) -> Tensor:
        """Run the model on uint8 pixels (B, H, W, 3): float (B, K)."""
        images = self.levels.normalized(pixels)
        return self.forward(self.model, images)


@torch.no_grad()
def corruption_errors(
    batches: Iterable[Batch],
    *,
    conditions: Sequence[Condition],
    jpeg_quality: int,
    using: Pass,
) -> dict[Corruption, dict[int, float]]:
    """Measure the top-1 error (percent) under each condition; images count once.

    Args:
        batches: One epoch of evaluation.
        jpeg_quality: Store corrupted images as JPEGs of this quality; 0 does not.
    """
    using.model.eval()
    num_right = torch.zeros(len(conditions), dtype=torch.float64)
    num_images = 0.0
    for batch in batches:
        clean = using.levels.of(batch.images)
        num_images += float(batch.weights.sum())
        for at, (corruption, severity) in enumerate(conditions):
            shown = _corrupted(
                clean,
                batch,
                corruption=corruption,
                severity=severity,
                jpeg_quality=jpeg_quality,
                using=using,
            )
            right = correct(using.logits(shown), batch.labels, k=1)
            num_right[at] += float((right * batch.weights).sum())
            using.on_images(_num_rows(batch))
    errors: dict[Corruption, dict[int, float]] = {}
    for (corruption, severity), right in zip(conditions, num_right, strict=True):
        error = 100 * (1 - float(right) / max(num_images, 1.0))
        errors.setdefault(corruption, {})[severity] = error
    return errors


def _corrupted(
    clean: np.ndarray,
    batch: Batch,
    *,
    corruption: Corruption,
    severity: int,
    jpeg_quality: int,
    using: Pass,
) -> np.ndarray:
    """Corrupt a batch: uint8 (B, H, W, 3); padding rows stay clean."""
    shown = clean.copy()
    rows = np.flatnonzero(batch.draw_ids >= 0).tolist()

    def change(place: int) -> None:
        row = rows[place]
        pixels = corrupt(
            clean[row],
            corruption=corruption,
            severity=severity,
            seed=using.seed,
            row_id=int(batch.draw_ids[row]),
        )
        if jpeg_quality:
            pixels = through_jpeg(pixels, quality=jpeg_quality)
        shown[row] = pixels

    list(using.threads.map(change, range(len(rows))))
    return shown


@torch.no_grad()
def flip_probabilities(
    batches: Iterable[Batch],
    *,
    num_frames: dict[Perturbation, int],
    source: Levels,
    using: Pass,
) -> dict[Perturbation, float]:
    """Measure how often (percent) a prediction changes along each kind of sequence.

    From frame to frame, or under noise from the first frame; no label is needed.

    Args:
        batches: One epoch of evaluation, larger than the model's images.
        num_frames: Of each perturbation that is measured.
        source: Levels of these batches.
    """
    using.model.eval()
    num_flips = dict.fromkeys(num_frames, 0.0)
    num_images = 0.0
    for batch in batches:
        pixels = source.of(batch.images)
        num_images += float(batch.weights.sum())
        for perturbation, num in num_frames.items():
            shown = _frames_of(
                pixels, batch, perturbation=perturbation, num_frames=num, using=using
            )
            before: Tensor | None = None
            for frame in shown:
                now = using.logits(frame).argmax(dim=1)
                if before is not None:
                    flipped = (now != before) * batch.weights
                    num_flips[perturbation] += float(flipped.sum())
                if before is None or perturbation not in NOISES:
                    before = now
                using.on_images(_num_rows(batch))
    return {
        name: 100 * num_flips[name] / max(num_images * (num - 1), 1.0)
        for name, num in num_frames.items()
    }


def _frames_of(
    pixels: np.ndarray,
    batch: Batch,
    *,
    perturbation: Perturbation,
    num_frames: int,
    using: Pass,
) -> Iterator[np.ndarray]:
    """Yield a batch's frames in turn: uint8 (B, H, W, 3), rows of weight 0 too."""
    sequences = [
        frames(
            image,
            perturbation=perturbation,
            img_size=using.levels.img_size,
            num_frames=num_frames,
            seed=using.seed,
            row_id=int(row_id),
        )
        for image, row_id in zip(pixels, batch.draw_ids, strict=True)
    ]
    size = using.levels.img_size
    for _ in range(num_frames):
        shown = np.empty((len(pixels), size, size, 3), np.uint8)

        def advance(place: int, *, shown: np.ndarray = shown) -> None:
            shown[place] = next(sequences[place])

        list(using.threads.map(advance, range(len(pixels))))
        yield shown


def _num_rows(batch: Batch) -> int:
    return int((batch.draw_ids >= 0).sum())
