"""Measure reading, decoding and training together in one process, without Ray."""

from __future__ import annotations

import dataclasses
import functools
import gc
import statistics
import time
from collections.abc import Mapping

from torch.profiler import profile, supported_activities

from benchmarks.model_cases import NUM_CLASSES, Case, run_of
from benchmarks.model_rounds import give_memory_back
from benchmarks.on_gpu.images import shards_of
from benchmarks.on_gpu.setting import Figures, Setting, Tasks
from pipelines.checkpoints.snapshot import take_snapshot
from pipelines.config import Run
from pipelines.data.batch import Batch
from pipelines.data.loader import Plans, opened_here
from pipelines.data.shard_set import read_shard_set
from pipelines.hardware.device import PeakMemory, is_gpu, synchronize
from pipelines.training.metrics import MetricSums
from pipelines.training.state import TrainState, build_state
from pipelines.training.step import TrainSettings, step_from, train_step
from pipelines.worker.throughput import Throughput

_NUM_SNAPSHOTS = 3
_NUM_KERNELS = 60
# Of a DeiT of one block a compiler has a quarter of So-ViT's kernels to make.
_TINY = (("depth", 1), ("embed_dim", 32), ("num_heads", 2))


def tasks(setting: Setting) -> Tasks:
    """Train with a compiled step, and with an eager one."""
    batch_size = setting.pick(256, tiny=2)
    return {
        f"{stage}, batch {batch_size}": functools.partial(
            _measure, setting, case_of(setting, stage, batch_size=batch_size)
        )
        for stage in ("compile", "channels_last")
    }


def case_of(setting: Setting, stage: str, *, batch_size: int) -> Case:
    """Return a case of So-ViT-14, or of a minimal network in a tiny run."""
    return Case(
        model=setting.pick("so_vit_14", tiny="so_vit_7"),
        subject=setting.pick("ours", tiny="timm"),
        stage=stage,
        batch_size=batch_size,
        img_size=setting.pick(224, tiny=32),
        device=setting.device.type,
        num_threads=setting.num_threads,
        sizes=setting.pick((), tiny=_TINY),
    )


def _measure(setting: Setting, case: Case) -> Figures:
    """Train for some epochs; then copy the state as a checkpoint does."""
    gc.collect()  # the model of the case before has reference cycles
    device = setting.device
    give_memory_back(device)
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
    micro_batches: list[Batch] = []
    with opened_here(shards, run=run, device=device, train=True) as loader:
        batches = clock.waiting(loader)
        for batch in batches:
            micro_batches = list(step_from(batch, batches))
            train_step(state, micro_batches, settings=settings, sums=sums)
            if batch.ends_epoch:
                state.guard.check()
                metrics = sums.total()
                logged.append(metrics | clock.rates(metrics["num_images"]))
                memory.look()
                clock.restart()
    # The first epoch warms up, or compiles.
    steady = logged[1:]
    figures = {
        "images_per_s": statistics.median(log["images_per_s"] for log in steady),
        "by_epoch": [log["images_per_s"] for log in steady],
        "waiting_share": statistics.median(log["waiting_share"] for log in steady),
        "bad_images": logged[-1]["num_bad"],
        **memory.metrics(),
        "checkpoint_copy_ms": [_copy_ms(run, state) for _ in range(_NUM_SNAPSHOTS)],
    }
    with profile(activities=supported_activities()) as profiled:
        train_step(state, micro_batches, settings=settings, sums=sums)
        synchronize(device)
    kernels = profiled.key_averages().table(
        sort_by=f"self_{'cuda' if is_gpu(device) else 'cpu'}_time_total",
        row_limit=_NUM_KERNELS,
    )
    with (setting.out / "profile.txt").open("a") as file:
        print(case.stage, kernels, sep="\n", file=file)
    return figures


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
