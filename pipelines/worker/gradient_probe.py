"""Probe the smoothness of a training's loss every few steps.

`sovit.probes` describes the measurement. One worker's share of the batch is probed,
just before it is trained on, with the targets and the draws of that step.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor, nn

from pipelines.data.batch import Batch
from pipelines.training.metrics import soft_cross_entropy
from pipelines.training.state import TrainState
from pipelines.training.step import TrainSettings, mixed, seed_step, step_errors
from pipelines.worker.probe_figure import Band, draw_bands
from sovit import Probed, find_stem, probe


class Prober:
    """Prober of the model at the steps that the run's `probe.every_steps` divides.

    Raises ValueError where the model has no such stem.
    """

    def __init__(self, model: nn.Module, *, settings: TrainSettings) -> None:
        self._settings = settings
        self._stem = find_stem(model, name=settings.run.probe.stem)
        self.bands: list[Band] = []
        """What was found since this process started."""
        self._num_summed = 0

    def summary(self) -> dict[str, float]:
        """Average the width of both bands over the probes since the last summary.

        The narrower, the smoother: `probe/loss_variation` is that of the losses,
        `probe/gradient_predictiveness` that of the gradient changes.
        """
        bands, self._num_summed = self.bands[self._num_summed :], len(self.bands)
        if not bands:
            return {}
        variation = fmean(band.loss_max - band.loss_min for band in bands)
        change = fmean(
            band.gradient_change_max - band.gradient_change_min for band in bands
        )
        return {
            "probe/loss_variation": variation,
            "probe/gradient_predictiveness": change,
        }

    def figure(self, title: str) -> Callable[[Path], None]:
        """Return a function that draws the bands so far into a file, in any process."""
        return partial(draw_bands, tuple(self.bands), title=title)

    def __call__(self, state: TrainState, batch: Batch) -> dict[str, float]:
        """Probe before a step that is due, which waits for the device.

        Returns the band's metrics, or none if no probe is due.
        """
        every, step = self._settings.run.probe.every_steps, state.position.step
        if not every or step % every:
            return {}
        # The draws of the step itself, which seeds them again when it begins.
        seed_step(step, settings=self._settings)
        with step_errors():
            band = _band(self._probe(state.model, batch), step=step)
        self.bands.append(band)
        return band.metrics

    def _probe(self, model: nn.Module, batch: Batch) -> Probed:
        images, targets = mixed(batch, settings=self._settings)
        num_images = batch.weights.sum().clamp(min=1)

        def loss(logits: Tensor) -> Tensor:
            losses = soft_cross_entropy(logits, targets)
            return (losses * batch.weights).sum() / num_images

        wanted = self._settings.run.probe
        sizes = torch.linspace(
            wanted.min_step_size, wanted.max_step_size, wanted.num_step_sizes
        )
        # Outside the run's autocast: bfloat16 loses the smallest steps.
        return probe(model, images, loss=loss, stem=self._stem, step_sizes=sizes)


def _band(found: Probed, *, step: int) -> Band:
    losses, changes = found.losses, found.gradient_changes
    return Band(
        step=step,
        loss=found.loss.item(),
        loss_min=losses.min().item(),
        loss_max=losses.max().item(),
        gradient_change_min=changes.min().item(),
        gradient_change_max=changes.max().item(),
    )
