"""Take training steps on the fake GPU, of any recipe with any settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from pipelines.building import build_state
from pipelines.config import Run
from pipelines.ingest.batch import Batch
from pipelines.loop import LoopSettings, train
from pipelines.recipe import load_recipe
from tests.fake_gpu.device import GPU
from tests.fake_gpu.watch import Watch

NUM_CLASSES = 1000
BATCH_SIZE = 8
# The first makes the optimiser's state; what comes after the second is like it.
NUM_STEPS = 2


def fake_run(
    recipe: str,
    *,
    kwargs: dict[str, Any] | None = None,
    optim: dict[str, Any] | None = None,
    log_every_steps: int = 1000,
    **scale: Any,
) -> Run:
    """Load a recipe and change what is named, of its scale too."""
    run = load_recipe(recipe)
    return dataclasses.replace(
        run,
        model=dataclasses.replace(run.model, kwargs=run.model.kwargs | (kwargs or {})),
        data=dataclasses.replace(run.data, batch_size=BATCH_SIZE),
        optim=dataclasses.replace(run.optim, **optim or {}),
        scale=dataclasses.replace(run.scale, num_workers=0, use_gpu=True, **scale),
        log_every_steps=log_every_steps,
        checkpoint_every_minutes=0.0,
    )


def batch_of(run: Run, *, index: int = 0, micro: int = 0) -> Batch:
    """Make a micro-batch that lies on the device, as the decoder leaves it."""
    num_micro = run.optim.num_accumulation
    num, side = BATCH_SIZE // num_micro, run.model.img_size
    images = torch.empty(num, 3, side, side, device=GPU)
    return Batch(
        images=images.to(memory_format=torch.channels_last),
        labels=torch.empty(num, dtype=torch.int64, device=GPU),
        weights=torch.empty(num, device=GPU),
        draw_ids=np.arange(num),
        epoch=0,
        index=index,
        micro=micro,
        global_rows=BATCH_SIZE,
        ends_step=micro == num_micro - 1,
        ends_epoch=False,
    )


def settings_of(run: Run, **settings: Any) -> LoopSettings:
    """Describe a worker's loop on the device."""
    return LoopSettings(
        run=run,
        num_classes=NUM_CLASSES,
        steps_per_epoch=1000,
        images_per_epoch=1000 * BATCH_SIZE,
        device=GPU,
        **settings,
    )


def take_steps(watch: Watch, run: Run, *, world_size: int = 1) -> None:
    """Train for some steps, and watch all of them."""
    state = build_state(run, num_classes=NUM_CLASSES, device=GPU, world_size=world_size)

    def batches() -> Iterator[Batch]:
        for index in range(NUM_STEPS):
            for micro in range(run.optim.num_accumulation):
                watch.off()
                batch = batch_of(run, index=index, micro=micro)
                watch.on()
                yield batch
        watch.off()

    train(
        state,
        batches(),
        settings=settings_of(run, world_size=world_size),
        on_log=lambda metrics, position: None,
        on_epoch_end=lambda state: None,
    )
    assert state.position.step == NUM_STEPS
