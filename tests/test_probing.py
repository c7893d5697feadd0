"""Training is probed where it is due, and goes on as if it were not."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from pipelines.config import Model, Probe, Run
from pipelines.data.batch import Batch
from pipelines.events.channel import Metrics
from pipelines.training.metrics import smooth_targets, soft_cross_entropy
from pipelines.training.state import TrainState
from pipelines.worker.gradient_probe import Prober
from pipelines.worker.probe_figure import Band, draw_bands
from sovit.probes import probe
from tests.small_loops import small_loop
from tests.small_runs import PLAIN_VIT, plain, settings_of, small_run, state_of

SIZES = (0.5, 4.0, 3)  # 0.5, 2.25 and 4
RESNET = Model(name="test_resnet", img_size=32)


def probed_run(*, every_steps: int, model: Model = PLAIN_VIT, **optim: Any) -> Run:
    low, high, num = SIZES
    wanted = Probe(
        every_steps=every_steps,
        min_step_size=low,
        max_step_size=high,
        num_step_sizes=num,
    )
    return dataclasses.replace(small_run("none", model=model, **optim), probe=wanted)


def batches(num: int, *, size: int = 16, num_bad: int = 0) -> list[Batch]:
    source = torch.Generator().manual_seed(5)
    return [
        Batch(
            images=torch.randn(6, 3, size, size, generator=source),
            labels=torch.randint(0, 3, (6,), generator=source),
            weights=(torch.arange(6) < 6 - num_bad).float(),
            epoch=0,
            index=index,
            micro=0,
            global_rows=6 - num_bad,
            ends_step=True,
            ends_epoch=False,
            draw_ids=np.arange(6),
        )
        for index in range(num)
    ]


def trained(
    run: Run, items: list[Batch]
) -> tuple[TrainState, list[tuple[int, dict[str, float]]], Prober]:
    """Train on the batches, probed; give the state, what was told, and the prober."""
    state, settings = state_of(run), settings_of(run, steps_per_epoch=10)
    prober = Prober(state.model, settings=settings)
    with small_loop(state, items, settings=settings, prober=prober) as loop:
        loop.train()
    told = [
        (event.step, dict(event.metrics))
        for event in loop.events
        if isinstance(event, Metrics) and "probe/loss_min" in event.metrics
    ]
    return state, told, prober


@pytest.mark.parametrize(("every", "steps"), [(0, []), (2, [0, 2, 4]), (3, [0, 3])])
def test_steps_that_are_due_are_probed(every: int, steps: list[int]) -> None:
    _, told, prober = trained(probed_run(every_steps=every), batches(5))
    assert [step for step, _ in told] == steps
    assert [band.step for band in prober.bands] == steps
    assert [band.metrics for band in prober.bands] == [metrics for _, metrics in told]


@pytest.mark.parametrize("model", [PLAIN_VIT, RESNET])
def test_probed_training_is_that_without_bit_for_bit(model: Model) -> None:
    """Weights, BatchNorm's statistics and the draws of mixup, dropout and drop path."""
    model = dataclasses.replace(model, drop_path_rate=0.3)
    items = batches(4, size=model.img_size)
    weights = [
        plain(trained(run, items)[0].model)
        for run in (
            probed_run(every_steps=every, model=model, mixup=0.8) for every in (0, 1)
        )
    ]
    assert weights[0].keys() == weights[1].keys()
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name


def test_a_band_holds_the_extremes_over_the_images_that_count() -> None:
    """The last two images could not be decoded: the loss is the mean of four."""
    run = probed_run(every_steps=1)
    (batch,) = batches(1, num_bad=2)
    _, told, prober = trained(run, [batch])
    targets = smooth_targets(batch.labels, num_classes=3, smoothing=0.1)

    def loss(logits: Tensor) -> Tensor:
        return soft_cross_entropy(logits[:4], targets[:4]).mean()

    low, high, num = SIZES
    found = probe(
        state_of(run).model.train(),
        batch.images,
        loss=loss,
        stem="patch_embed",
        step_sizes=torch.linspace(low, high, num),
    )
    ((_, metrics),), (band,) = told, prober.bands
    wanted = {
        "probe/loss_min": found.losses.min(),
        "probe/loss_max": found.losses.max(),
        "probe/gradient_change_min": found.gradient_changes.min(),
        "probe/gradient_change_max": found.gradient_changes.max(),
    }
    assert metrics == pytest.approx({name: v.item() for name, v in wanted.items()})
    assert band.loss == pytest.approx(found.loss.item())
    assert band.loss < band.loss_max


def test_the_bands_widths_are_averaged_once_each() -> None:
    """What a sweep may look for: the narrower, the smoother."""
    _, _, prober = trained(probed_run(every_steps=2), batches(5))
    widths = {
        "probe/loss_variation": fmean(
            band.loss_max - band.loss_min for band in prober.bands
        ),
        "probe/gradient_predictiveness": fmean(
            band.gradient_change_max - band.gradient_change_min for band in prober.bands
        ),
    }
    assert min(widths.values()) > 0
    assert prober.summary() == pytest.approx(widths)
    assert prober.summary() == {}


def test_an_unknown_stem_is_refused_before_training() -> None:
    run = probed_run(every_steps=1)
    wanted = dataclasses.replace(run.probe, stem="trunk")
    run = dataclasses.replace(run, probe=wanted)
    with pytest.raises(ValueError, match=r"got 'trunk'.*patch_embed"):
        trained(run, batches(1))


def test_the_bands_become_a_picture(tmp_path: Path) -> None:
    bands = [
        Band(
            step=step,
            loss=2.0 - step,
            loss_min=1.5 - step,
            loss_max=3.0,
            gradient_change_min=0.1,
            gradient_change_max=0.1 + step,
        )
        for step in range(3)
    ]
    draw_bands(bands, tmp_path / "bands.png", title="a run")
    with Image.open(tmp_path / "bands.png") as picture:
        assert picture.format == "PNG"
        pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3)
    assert len(np.unique(pixels, axis=0)) > 10
