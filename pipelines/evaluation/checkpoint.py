"""Evaluate a checkpoint in one process, beside its training or after it: no Ray."""

from __future__ import annotations

import copy
import dataclasses
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn
from tqdm import tqdm

from pipelines.checkpoints.manifest import Manifest, load_model, load_weights
from pipelines.checkpoints.snapshot import EMA_FILE
from pipelines.config import Run
from pipelines.data.batch import Batch, Position
from pipelines.data.loader import OnBad, ignore_bad, opened_here
from pipelines.data.shard_set import ShardSet
from pipelines.evaluation.held_out import HeldOut, keys_of
from pipelines.evaluation.measure import (
    EvaluationResult,
    check_counted,
    models_of,
    validate,
)
from pipelines.evaluation.report import Report

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class CheckpointEvaluation:
    """Result of evaluating one checkpoint."""

    position: Position
    """Where the checkpoint's training stood."""
    metrics: dict[str, float]
    """By their MLflow names."""
    outcomes: dict[str, EvaluationResult]
    """By the sets' prefixes, `val` for the run's own; worst images have their keys."""

    @property
    def reports(self) -> dict[str, Report]:
        """Reports by the sets' prefixes."""
        return reports_of(self.outcomes)


def measure_checkpoint(
    folder: Path,
    *,
    sets: Sequence[HeldOut],
    weights: Literal["average", "both"],
    device: torch.device,
    num_threads: int = 1,
    on_bad: Callable[[HeldOut], OnBad] = lambda held_out: ignore_bad,
) -> CheckpointEvaluation:
    """Evaluate a checkpoint's weights on some sets, as its run evaluates.

    A batch is a worker's share of an evaluation step of the run.

    Args:
        num_threads: That decode. Those that compute are the process's.
        on_bad: For a set, what is told of its bad images.

    Raises ValueError where the folder is no whole checkpoint or a set can't be read,
    and BadImagesError where too many images can't be decoded.
    """
    models, manifest = load_models(folder, weights=weights)
    run = manifest.run
    batch_size = math.ceil(run.data.eval_batch_size / run.scale.world_size)
    run = here(run, batch_size=batch_size, num_threads=num_threads)
    for model in models.values():
        model.to(device).to(memory_format=torch.channels_last)
    metrics: dict[str, float] = {}
    outcomes: dict[str, EvaluationResult] = {}
    for one in sets:
        outcome = measure_set(models, one, run=run, device=device, on_bad=on_bad(one))
        outcomes[one.prefix] = named(outcome, shards=one.shards)
        metrics |= outcome.metrics(one.prefix)
    return CheckpointEvaluation(
        position=manifest.position, metrics=metrics, outcomes=outcomes
    )


def load_models(
    folder: Path, *, weights: Literal["average", "both"]
) -> tuple[dict[str, nn.Module], Manifest]:
    """Load a checkpoint's average and, if wanted, its raw weights beside it.

    Of a run that kept no average the raw weights are all there is.
    """
    first, manifest = load_model(folder)
    raw, average = first, first if EMA_FILE in manifest.files else None
    if average is not None and weights == "both":
        raw = copy.deepcopy(first)
        load_weights(raw, folder)
    return models_of(raw, average=average, weights=weights), manifest


def here(run: Run, *, batch_size: int, num_threads: int) -> Run:
    """Adapt a run to evaluation in one process that decodes for itself."""
    data = dataclasses.replace(
        run.data,
        eval_batch_size=batch_size,
        num_decode_threads=num_threads,
        decode_on="workers",
    )
    # One process has no workers to give an image each.
    scale = dataclasses.replace(run.scale, num_workers=1, min_workers=0)
    return dataclasses.replace(run, data=data, scale=scale)


def measure_set(
    models: Mapping[str, nn.Module],
    held_out: HeldOut,
    *,
    run: Run,
    device: torch.device,
    on_bad: OnBad = ignore_bad,
) -> EvaluationResult:
    """Evaluate models on a set in this process, with progress on a terminal.

    Raises as `check_counted`, and ValueError where the set can't be read.
    """
    shards = held_out.shards
    num_rows = shards.groups.total_rows
    with opened_here(shards, run=run, device=device, on_bad=on_bad) as batches:
        outcome = validate(
            models,
            _counted(batches, num_images=num_rows, text=held_out.name),
            run=run,
            device=device,
            held_out=held_out,
        )
    check_counted(outcome, num_rows=num_rows, max_bad_share=run.data.max_bad_share)
    return outcome


def named(outcome: EvaluationResult, *, shards: ShardSet) -> EvaluationResult:
    """Look up the keys of the worst images; if that fails, rows identify them."""
    report = outcome.report
    if report is None:
        return outcome
    try:
        report = report.named(keys_of(shards, report.worst.row_ids.tolist()))
    except ValueError as error:
        logger.warning("the worst images go by their rows: %s", error)
    return dataclasses.replace(outcome, report=report)


def reports_of(outcomes: Mapping[str, EvaluationResult]) -> dict[str, Report]:
    """Collect the reports of outcomes that have one."""
    return {
        name: outcome.report
        for name, outcome in outcomes.items()
        if outcome.report is not None
    }


def _counted(
    batches: Iterable[Batch], *, num_images: int, text: str
) -> Iterator[Batch]:
    """Show progress with rate and time left; a bar is only drawn in a terminal."""
    with tqdm(total=num_images, unit="image", desc=text or None, disable=None) as bar:
        for batch in batches:
            yield batch
            bar.update(batch.global_rows)
