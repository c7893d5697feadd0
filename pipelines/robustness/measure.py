"""Measure a checkpoint's robustness: what `sovit-eval --corruptions` adds."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from pipelines.config import Run
from pipelines.data.batch import Batch
from pipelines.robustness.corruptions import CORRUPTIONS, Corruption
from pipelines.robustness.options import Robustness
from pipelines.robustness.passes import (
    Condition,
    Pass,
    corruption_errors,
    flip_probabilities,
)
from pipelines.robustness.perturbations import (
    PERTURBATIONS,
    Perturbation,
    num_frames_of,
)
from pipelines.robustness.scores import corruption_scores, flip_scores
from pipelines.training.step import Forward
from pipelines.transforms.normalize import Levels

OpenBatches = Callable[[Run], contextlib.AbstractContextManager[Iterable[Batch]]]
"""Callable that opens one epoch of evaluation batches, as a run describes them."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """The model to measure, and the images to measure it on."""

    model: nn.Module
    run: Run
    """As evaluation changes it."""
    device: torch.device
    num_classes: int
    num_images: int
    open_batches: OpenBatches


def measure(
    subject: Subject, *, options: Robustness, clean_error: float
) -> dict[str, Any]:
    """Measure what the options ask for.

    Args:
        clean_error: Top-1 error (percent) on the images as they are.

    Returns:
        For `corruptions` the errors of each and their scores, for `perturbations` the
        flip probabilities and theirs, in percent; and what they were measured with.
    """
    result: dict[str, Any] = {}
    if options.corruptions is not None:
        errors = _corruption_errors(subject, options=options)
        result["corruptions"] = {
            "seed": options.corruption_seed,
            "jpeg_quality": options.corruption_jpeg,
            "num_classes": subject.num_classes,
            "errors": errors,
            **corruption_scores(errors, clean_error=clean_error),
        }
    if options.perturbations is not None:
        flips = _flip_probabilities(subject, options=options)
        reference = options.reference_flips()
        result["perturbations"] = {
            "seed": options.corruption_seed,
            "num_frames": {
                name: num_frames_of(name, at_most=options.num_frames) for name in flips
            },
            "flips": flips,
            **flip_scores(flips, reference=reference),
        }
    return result


def _corruption_errors(
    subject: Subject, *, options: Robustness
) -> dict[Corruption, dict[int, float]]:
    conditions: list[Condition] = [
        (corruption, severity)
        for corruption in options.corruptions or CORRUPTIONS
        for severity in sorted(set(options.severities))
    ]
    total = subject.num_images * len(conditions)
    with (
        _pass(subject, options=options, total=total, text="corruptions") as using,
        subject.open_batches(subject.run) as batches,
    ):
        return corruption_errors(
            batches,
            conditions=conditions,
            jpeg_quality=options.corruption_jpeg,
            using=using,
        )


def _flip_probabilities(
    subject: Subject, *, options: Robustness
) -> dict[Perturbation, float]:
    num_frames: dict[Perturbation, int] = {
        name: num_frames_of(name, at_most=options.num_frames)
        for name in options.perturbations or PERTURBATIONS
    }
    run = _larger(subject.run)
    total = subject.num_images * sum(num_frames.values())
    with (
        _pass(subject, options=options, total=total, text="perturbations") as using,
        subject.open_batches(run) as batches,
    ):
        return flip_probabilities(
            batches,
            num_frames=num_frames,
            source=_levels(run, device=subject.device),
            using=using,
        )


def _larger(run: Run) -> Run:
    """Return the run with evaluation on the full square that its crop is cut from."""
    short = math.floor(run.model.img_size / run.data.crop_pct)
    return dataclasses.replace(
        run,
        model=dataclasses.replace(run.model, img_size=short),
        data=dataclasses.replace(run.data, crop_pct=1.0),
    )


@contextlib.contextmanager
def _pass(
    subject: Subject, *, options: Robustness, total: int, text: str
) -> Iterator[Pass]:
    """Open a pass with a progress bar of its rate and time left."""
    with (
        tqdm(total=total, unit="image", desc=text, disable=None) as bar,
        ThreadPoolExecutor(subject.run.data.num_decode_threads) as threads,
    ):
        yield Pass(
            model=subject.model,
            forward=Forward.of(subject.run, device=subject.device),
            levels=_levels(subject.run, device=subject.device),
            seed=options.corruption_seed,
            threads=threads,
            on_images=bar.update,
        )


def _levels(run: Run, *, device: torch.device) -> Levels:
    return Levels(
        run.pixels(train=False),
        device=device,
        num_threads=run.data.num_decode_threads,
    )
