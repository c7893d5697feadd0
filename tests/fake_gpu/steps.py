"""Take training steps on the fake GPU, of any recipe with any settings."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

from pipelines.config import Run
from pipelines.config.recipes import load_recipe
from pipelines.data.batch import Batch
from pipelines.training.state import TrainState, build_state
from pipelines.training.step import TrainSettings
from tests.fake_gpu.device import GPU
from tests.fake_gpu.watch import Watch
from tests.fake_gpu.workers import sum_gradients
from tests.small_loops import small_loop

NUM_CLASSES = 1000
BATCH_SIZE = 8
"""Images of a worker's share of a step."""
# The first makes the optimiser's state; what comes after the second is like it.
NUM_STEPS = 2
# Data parallelism finds its buckets in those before, once in a run.
_NUM_BEFORE, _NUM_TOGETHER = 3, 1


def fake_run(
    recipe: str,
    *,
    kwargs: dict[str, Any] | None = None,
    optim: dict[str, Any] | None = None,
    log_every_steps: int = 1000,
    world_size: int = 1,
    **scale: Any,
) -> Run:
    """Load a recipe with changed settings, of its scale too; steps stay eager."""
    run = load_recipe(recipe)
    scale = {"use_gpu": True, "compile": False, **scale}
    num_workers = world_size if world_size > 1 else 0
    return dataclasses.replace(
        run,
        model=dataclasses.replace(run.model, kwargs=run.model.kwargs | (kwargs or {})),
        data=dataclasses.replace(run.data, batch_size=BATCH_SIZE * world_size),
        optim=dataclasses.replace(run.optim, **optim or {}),
        scale=dataclasses.replace(run.scale, num_workers=num_workers, **scale),
        log_every_steps=log_every_steps,
        checkpoint_every_minutes=0.0,
    )


def batch_of(run: Run, *, index: int = 0, micro: int = 0) -> Batch:
    """Build a micro-batch on the device, as from the decoder."""
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
        global_rows=run.data.batch_size,
        ends_step=micro == num_micro - 1,
        ends_epoch=False,
    )


def settings_of(run: Run, **settings: Any) -> TrainSettings:
    """Return the settings of a worker's training on the device."""
    return TrainSettings(
        run=run,
        num_classes=NUM_CLASSES,
        steps_per_epoch=1000,
        images_per_epoch=1000 * BATCH_SIZE,
        device=GPU,
        **settings,
    )


def take_steps(watch: Watch, run: Run, *, world_size: int = 1) -> TrainState:
    """Train for two steps and watch them; with several workers, as the fourth."""
    num_before, num = 0, NUM_STEPS
    if world_size > 1:
        num_before, num = _NUM_BEFORE, _NUM_TOGETHER
    # A fake tensor that FSDP2 moved would still say that it lies on the host.
    is_sharded = run.scale.sharding == "fsdp"
    with GPU if is_sharded else contextlib.nullcontext():
        state = build_state(
            run, num_classes=NUM_CLASSES, device=GPU, world_size=world_size
        )
    if isinstance(state.forward, DistributedDataParallel):
        sum_gradients(state.forward)

    def batches() -> Iterator[Batch]:
        for index in range(num_before + num):
            for micro in range(run.optim.num_accumulation):
                watch.off()
                batch = batch_of(run, index=index, micro=micro)
                if index >= num_before:
                    watch.on()
                yield batch
        watch.off()

    settings = settings_of(run, world_size=world_size)
    with small_loop(state, batches(), settings=settings) as loop:
        loop.train()
    assert state.position.step == num_before + num
    return state
