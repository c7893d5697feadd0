"""Measure reading, decoding and training together in one process, without Ray."""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Mapping

from benchmarks.model_cases import NUM_CLASSES, Case, run_of
from benchmarks.on_gpu.compiled import cases_of
from benchmarks.on_gpu.images import shards_of
from benchmarks.on_gpu.rates import device_of
from benchmarks.on_gpu.stages import Figures, Setting, Tasks
from benchmarks.on_gpu.steps import clean_up, name_of
from pipelines.checkpoints.snapshot import take_snapshot
from pipelines.config import Run
from pipelines.data.loader import opened_here
from pipelines.data.shard_set import read_shard_set
from pipelines.data.stream import Plans
from pipelines.hardware.device import PeakMemory
from pipelines.training.metrics import MetricSums
from pipelines.training.state import TrainState, build_state
from pipelines.training.step import TrainSettings, step_from, train_step
from pipelines.worker.throughput import Throughput

_NUM_SNAPSHOTS = 3


def tasks(setting: Setting) -> Tasks:
    """Train with a compiled step, and with an eager one."""
    compiled = cases_of(setting)[0]
    eager = dataclasses.replace(compiled, stage="channels_last")
    cases = (compiled, eager)
    return {name_of(case): functools.partial(_measure, setting, case) for case in cases}


def _measure(setting: Setting, case: Case) -> Figures:
    """Train for some epochs; then copy the state as a checkpoint does."""
    clean_up(setting)
    device = device_of(setting)
    run = on_shards(setting, case, num_epochs=setting.pick(6, tiny=2))
    shards = read_shard_set(run.data.train)
    epoch = Plans(shards=shards, run=run, train=True).shape(0)
    settings = TrainSettings(
        run=run,
        num_classes=NUM_CLASSES,
        steps_per_epoch=epoch.num_batches,
        images_per_epoch=epoch.num_images,
        device=device,
    )
    state = build_state(run, num_classes=NUM_CLASSES, device=device)
    logged: list[Mapping[str, float]] = []
    memory, sums, clock = PeakMemory(device), MetricSums(device), Throughput()
    state.forward.train()
    with opened_here(shards, run=run, device=device, train=True) as loader:
        batches = clock.waiting(loader)
        for batch in batches:
            micro_batches = step_from(batch, batches)
            train_step(state, micro_batches, settings=settings, sums=sums)
            if batch.ends_epoch:
                state.guard.check()
                metrics = sums.total()
                logged.append(metrics | clock.rates(metrics["num_images"]))
                memory.look()
                clock.restart()
    # The first epoch warms up, or compiles.
    steady = logged[1:]
    return {
        "images_per_s": statistics.median(log["images_per_s"] for log in steady),
        "by_epoch": [log["images_per_s"] for log in steady],
        "waiting_share": statistics.median(log["waiting_share"] for log in steady),
        "bad_images": logged[-1]["num_bad"],
        **memory.metrics(),
        "checkpoint_copy_ms": [_copy_ms(run, state) for _ in range(_NUM_SNAPSHOTS)],
    }


def on_shards(setting: Setting, case: Case, *, num_epochs: int) -> Run:
    """Build the case's run on the shards of `images`."""
    run, shards = run_of(case), str(shards_of(setting))
    data = dataclasses.replace(
        run.data, train=shards, val=shards, num_decode_threads=setting.num_threads
    )
    optim = dataclasses.replace(
        run.optim, num_epochs=num_epochs, warmup_epochs=0, cooldown_epochs=0
    )
    return dataclasses.replace(run, data=data, optim=optim)


def _copy_ms(run: Run, state: TrainState) -> float:
    """Measure the milliseconds of the copy that training waits for."""
    start_s = time.perf_counter()
    take_snapshot(
        run=run,
        position=state.position,
        classes=(),
        metrics={},
        model=state.model,
        ema=None if state.ema is None else state.ema.module,
        optimizer=state.optimizer,
    )
    return 1000 * (time.perf_counter() - start_s)
