"""Train on what our loader gives, and see how long the training waits for it."""

from __future__ import annotations

import dataclasses
import itertools
import resource
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch

import sovit
from benchmarks.frame import ray_session
from benchmarks.ours import describe_run, open_supply
from benchmarks.work import Work
from pipelines.checkpoint import build_model
from pipelines.config import Model, Run
from pipelines.ingest.batch import Batch
from pipelines.ingest.footers import read_shard_set
from pipelines.ingest.stream import Plans
from pipelines.loop import LoopSettings, TrainState, train
from pipelines.optim import build_optimizer

NUM_EPOCHS = 3


@dataclass(frozen=True, kw_only=True)
class Waiting:
    """Hold how long a training waited for images, epoch by epoch."""

    model: str
    device: str
    first_batch_s: float
    """From the start of the loader to the first batch."""
    images_per_s: tuple[float, ...]
    waiting_share: tuple[float, ...]
    """Of an epoch's time, that in which the loop waited for a batch."""
    between_epochs_s: tuple[float, ...]
    """From asking for a batch after an epoch's last to the next one's first."""
    peak_bytes: int
    """Largest resident memory of the training process, shared memory included."""


def train_and_wait(work: Work) -> Waiting:
    """Train for some epochs on the CPU or the GPU that the work is for.

    The loop is that of a run; it logs at an epoch's end. On a GPU the model is So-ViT-7
    at the work's size, on a CPU one of the demo's size.
    """
    torch.set_num_threads(work.num_threads)
    with ray_session(work.num_threads):
        return _train(work)


def _train(work: Work) -> Waiting:
    name, model = _model(work)
    run = describe_run(work, num_epochs=NUM_EPOCHS, model=model)
    shards = read_shard_set(run.data.train)
    epoch = Plans(shards=shards, run=run, train=True).shape(0)
    settings = LoopSettings(
        run=run,
        num_classes=len(shards.classes),
        steps_per_epoch=epoch.num_batches,
        images_per_epoch=epoch.num_images,
        device=torch.device(work.device),
    )
    state = _train_state(run=run, num_classes=settings.num_classes, work=work)
    logged: list[Mapping[str, float]] = []
    gaps_s: list[float] = []
    start_s = time.perf_counter()
    supply = open_supply(run, work=work)
    supply.start()
    try:
        batches = iter(supply)
        first = next(batches)
        first_batch_s = time.perf_counter() - start_s
        train(
            state,
            _watch(itertools.chain([first], batches), gaps_s=gaps_s),
            settings=settings,
            on_log=lambda metrics, _: logged.append(metrics),
            on_epoch_end=lambda _: None,
        )
    finally:
        supply.close()
    return Waiting(
        model=name,
        device=work.device,
        first_batch_s=first_batch_s,
        images_per_s=tuple(metrics["images_per_s"] for metrics in logged),
        waiting_share=tuple(metrics["waiting_share"] for metrics in logged),
        between_epochs_s=tuple(gaps_s),
        peak_bytes=1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    )


def _model(work: Work) -> tuple[str, Model]:
    pooling = sovit.default_pooling("so_vit_7")
    model = Model(name="so_vit_7", img_size=work.img_size, pooling=pooling)
    if work.device == "cuda":
        return "so_vit_7", model
    size: dict[str, int | float | str] = {"depth": 4, "embed_dim": 128, "num_heads": 2}
    return "so_vit_7 of the demo's size", dataclasses.replace(model, kwargs=size)


def _train_state(*, run: Run, num_classes: int, work: Work) -> TrainState:
    model = build_model(run.model, num_classes=num_classes)
    model.to(work.device).to(memory_format=torch.channels_last)
    optimizer = build_optimizer(model, optim=run.optim)
    return TrainState(model=model, forward=model, optimizer=optimizer, ema=None)


def _watch(batches: Iterable[Batch], *, gaps_s: list[float]) -> Iterator[Batch]:
    """Note how long each epoch's first batch is waited for, the first epoch's apart."""
    iterator = iter(batches)
    ended = False
    while True:
        asked_s = time.perf_counter()
        batch = next(iterator, None)
        if batch is None:
            return
        if ended:
            gaps_s.append(time.perf_counter() - asked_s)
        ended = batch.ends_epoch
        yield batch
