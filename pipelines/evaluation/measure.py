"""Evaluate one or more models in one pass over a held-out set, on all workers.

The images are read and decoded once, however many models look at them; every image
counts once. Torch alone: no Ray, no MLflow.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from pipelines.config import Run
from pipelines.data.batch import Batch
from pipelines.errors import check_bad_share
from pipelines.evaluation.held_out import HeldOut
from pipelines.evaluation.report import Confusions, Report
from pipelines.evaluation.scores import ConfusionSums, RealSums, Seen, WorstSoFar
from pipelines.hardware.device import upload
from pipelines.hardware.row_limit import RowLimit
from pipelines.training.metrics import MetricSums
from pipelines.training.step import FittingForward, Forward

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Score:
    """Scores of one model over all workers: mean loss, and accuracies in percent."""

    loss: float
    top1: float
    top5: float
    num_images: float
    num_bad: float
    """Images that could not be decoded."""
    real_top1: float | None = None
    """Of the predictions among an image's ReaL labels; None where there are none."""
    num_real: int = 0
    """Images that have ReaL labels."""
    balanced_top1: float | None = None
    """Mean of the classes' recalls; None where the set is not described."""

    def values(self) -> dict[str, float]:
        """Return the measured values by name."""
        found = dataclasses.asdict(self)
        if self.real_top1 is None:
            del found["real_top1"], found["num_real"]
        if self.balanced_top1 is None:
            del found["balanced_top1"]
        return found


@dataclass(frozen=True, kw_only=True)
class EvaluationResult:
    """Result of an evaluation, the same on all workers."""

    scores: Mapping[str, Score]
    """By the models' names, the first model's first."""
    report: Report | None = None
    """Of the first model, where a held-out set was described."""

    @property
    def primary(self) -> Score:
        """Score of the first model."""
        return next(iter(self.scores.values()))

    def metrics(self, prefix: str = "val") -> dict[str, float]:
        """Return all metrics by MLflow name: `val/top1`, a second one `val_raw/top1`.

        The counts of images, the same for all models, appear once.
        """
        found: dict[str, float] = {}
        for name, score in self.scores.items():
            values = score.values()
            counts = {
                "num_images": values.pop("num_images"),
                "bad_images": values.pop("num_bad"),
            }
            num_real = values.pop("num_real", None)
            if num_real is not None:
                counts["num_real"] = num_real
            if found:
                prefix_of = f"{prefix}_{name}"
            else:
                prefix_of, values = prefix, values | counts
            found |= {f"{prefix_of}/{key}": value for key, value in values.items()}
        return found


def models_of(
    model: nn.Module, *, average: nn.Module | None, weights: Literal["average", "both"]
) -> dict[str, nn.Module]:
    """Select the models to evaluate: the average first, where one is kept."""
    if average is None:
        return {"raw": model}
    if weights == "average":
        return {"average": average}
    return {"average": average, "raw": model}


class Narrowed(nn.Module):
    """Model restricted to some of its classes, as for ImageNet-A.

    Args:
        columns: The model's number of each class.
    """

    def __init__(self, model: nn.Module, columns: tuple[int, ...]) -> None:
        super().__init__()
        self.model = model
        self._columns = torch.tensor(columns)

    def forward(self, images: Tensor) -> Tensor:
        """Compute the logits (B, len(columns)) of images (B, 3, H, W)."""
        logits = self.model(images)
        if self._columns.device != logits.device:
            self._columns = self._columns.to(logits.device)
        return logits.index_select(1, self._columns)


def narrowed(model: nn.Module, columns: tuple[int, ...] | None) -> nn.Module:
    """Restrict a model to a set's classes: see `HeldOut.columns`."""
    return model if columns is None else Narrowed(model, columns)


class _Tally:
    """Running sums of one model; for the first also its worst images."""

    def __init__(
        self,
        *,
        run: Run,
        device: torch.device,
        held_out: HeldOut | None,
        real: Tensor | None,
        is_first: bool,
    ) -> None:
        self._held_out = held_out
        self._sums = MetricSums(device)
        self._real = None if real is None else RealSums(real)
        self._confusions = self._worst = None
        self._confused: Confusions | None = None
        if held_out is not None:
            self._confusions = ConfusionSums(len(held_out.classes), device=device)
        if held_out is not None and is_first:
            self._worst = WorstSoFar(
                run.validation.num_worst,
                img_size=run.model.img_size,
                data=run.data,
                device=device,
            )

    def add(self, logits: Tensor, batch: Batch, *, rows: Tensor) -> None:
        logits = logits.float()
        losses = nn.functional.cross_entropy(logits, batch.labels, reduction="none")
        self._sums.add(
            logits, batch.labels, batch.weights, losses, num_bad=batch.num_bad
        )
        if self._real is None and self._confusions is None:
            return
        predictions = logits.topk(1, dim=1).indices
        seen = Seen(
            images=batch.images,
            labels=batch.labels,
            weights=batch.weights,
            rows=rows,
            losses=losses,
            predictions=predictions[:, 0],
            probabilities=logits.softmax(dim=1).gather(1, predictions)[:, 0],
        )
        for part in (self._real, self._confusions, self._worst):
            if part is not None:
                part.add(seen)

    def score(self) -> Score:
        """Reduce the sums over all workers: a collective."""
        means = self._sums.total()
        real_top1, num_real = self._real.total() if self._real else (None, 0)
        if self._confusions is not None and self._held_out is not None:
            self._confused = self._confusions.total(self._held_out.classes)
        return Score(
            loss=means["loss"],
            top1=means["top1"],
            top5=means["top5"],
            num_images=means["num_images"],
            num_bad=means["num_bad"],
            real_top1=real_top1,
            num_real=num_real,
            balanced_top1=self._confused.balanced_top1 if self._confused else None,
        )

    def report(self) -> Report | None:
        """Gather the worst images of all workers, after `score`: a collective."""
        if self._confused is None or self._worst is None:
            return None
        return Report(confusions=self._confused, worst=self._worst.total())


def _warn(line: str, max_rows: int) -> None:
    logger.warning("%s", line)


@torch.no_grad()
def validate(
    models: Mapping[str, nn.Module],
    batches: Iterable[Batch],
    *,
    run: Run,
    device: torch.device,
    held_out: HeldOut | None = None,
    limit: RowLimit | None = None,
) -> EvaluationResult:
    """Evaluate models on one epoch of batches; every image counts once.

    All workers call it together, with the same models: it is a collective.

    Args:
        models: By name, the one whose metrics have plain names first; they are left in
            evaluation mode.
        run: Says in what precision they compute, whether mirror images count, and how
            many of the worst images are reported.
        held_out: Describes the set; without it labels are the models' own, and neither
            classes nor images are reported.
        limit: Limit of the rows of a pass, lowered where memory runs out.

    Raises ValueError where one image does not fit.
    """
    forward = FittingForward(
        forward=Forward.of(run, device=device),
        limit=limit or RowLimit(on_lowered=_warn),
    )
    real = columns = None
    if held_out is not None:
        columns = held_out.columns
        if held_out.real is not None:
            real = torch.from_numpy(held_out.real).to(device)
    seen_by = {name: narrowed(model, columns) for name, model in models.items()}
    tallies: dict[str, _Tally] = {}
    for name, model in seen_by.items():
        model.eval()
        tallies[name] = _Tally(
            run=run,
            device=device,
            held_out=held_out,
            real=real,
            is_first=not tallies,
        )
    for batch in batches:
        rows = upload(torch.from_numpy(batch.draw_ids), device)
        for name, model in seen_by.items():
            logits = forward(model, batch.images)
            tallies[name].add(logits, batch, rows=rows)
        if batch.ends_epoch and batch.ends_step:
            break
    scores = {name: tally.score() for name, tally in tallies.items()}
    reports = [tally.report() for tally in tallies.values()]
    return EvaluationResult(scores=scores, report=reports[0])


def check_counted(
    outcome: EvaluationResult, *, num_rows: int, max_bad_share: float
) -> None:
    """Raise where not every image of a set was counted once, or too many are bad.

    ValueError for the first, BadImagesError for the second.
    """
    score = outcome.primary
    num_bad = round(score.num_bad)
    if score.num_images + num_bad != num_rows:
        raise ValueError(
            f"expected each of the {num_rows} held-out images counted once, got "
            f"{score.num_images:.0f} and {num_bad} that can't be decoded; the shards "
            "changed while they were read"
        )
    check_bad_share(num_bad, num_images=num_rows, max_share=max_bad_share)
