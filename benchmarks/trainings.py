"""Train small networks on the demo's photographs, in turns."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from timm.utils.model_ema import ModelEmaV3
from torch import nn
from tqdm import tqdm

from benchmarks.machine import machine
from benchmarks.result_file import write_result
from pipelines.cli.outputs import check_file
from pipelines.config import Run, Scale
from pipelines.data.loader import opened_here
from pipelines.data.shard_set import read_shard_set
from pipelines.data.stream import Plans
from pipelines.evaluation.measure import validate
from pipelines.training.metrics import MetricSums
from pipelines.training.nonfinite import NonFiniteGuard
from pipelines.training.optimizer import build_optimizer
from pipelines.training.state import TrainState
from pipelines.training.step import TrainSettings, step_from, train_step
from recipes.demo import demo

Build = Callable[[int], nn.Module]
"""Makes a network for a number of classes."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """How much is trained, and where the figures go."""

    num_seeds: int = 3
    num_epochs: int = 5
    num_threads: int = 2
    json: Path | None = None
    """File for all figures, written after each training."""

    def __post_init__(self) -> None:
        if self.num_seeds < 1:
            raise ValueError(
                f"expected a seed at least, got {self.num_seeds}; set --num-seeds"
            )


@dataclass(frozen=True, kw_only=True)
class Trained:
    """Result of one training."""

    top1: float
    """Percent of the held-out photographs, raw weights."""
    ema_top1: float
    """Of the weights' moving average."""
    num_params: int
    seconds: float
    """Of training, without evaluation."""


Results = Mapping[str, Sequence[Trained]]
"""By the network's name, a seed each."""


def train_all(builds: Mapping[str, Build], *, options: Options) -> Results:
    """Train each network with each seed.

    They take turns, so that a machine's drift affects all of them.
    """
    check_file(options.json, option="json")
    torch.set_num_threads(options.num_threads)
    results: dict[str, list[Trained]] = {name: [] for name in builds}
    work = [(name, seed) for seed in range(options.num_seeds) for name in builds]
    content: dict[str, Any] = {"machine": machine(), "options": str(options)}
    for place, (name, seed) in enumerate(tqdm(work, unit="training", disable=None)):
        trained = train_once(builds[name], seed=seed, num_epochs=options.num_epochs)
        results[name].append(trained)
        content["trainings"] = {
            name: [asdict(one) for one in found] for name, found in results.items()
        }
        missing = [f"{name}, seed {seed}" for name, seed in work[place + 1 :]]
        write_result(options.json, content, missing=missing)
    return results


def train_once(build: Build, *, seed: int, num_epochs: int) -> Trained:
    """Train the network of `build` with one seed, and evaluate it."""
    run = describe_run(seed=seed, num_epochs=num_epochs)
    train_set, val_set = (read_shard_set(it) for it in (run.data.train, run.data.val))
    epoch = Plans(shards=train_set, run=run, train=True).shape(0)
    device = torch.device("cpu")
    settings = TrainSettings(
        run=run,
        num_classes=len(train_set.classes),
        steps_per_epoch=epoch.num_batches,
        images_per_epoch=epoch.num_images,
        device=device,
    )
    torch.manual_seed(seed)
    model = build(settings.num_classes).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    average = ModelEmaV3(model, decay=run.optim.ema_decay)
    optimizer = build_optimizer(model, optim=run.optim)
    state = TrainState(
        model=model,
        forward=model,
        optimizer=optimizer,
        ema=average,
        guard=NonFiniteGuard(model, optimizer, optim=run.optim, device=device),
    )
    sums = MetricSums(device)
    state.forward.train()
    start_s = time.perf_counter()
    with opened_here(train_set, run=run, device=device, train=True) as loader:
        batches = iter(loader)
        for batch in batches:
            micro_batches = step_from(batch, batches)
            train_step(state, micro_batches, settings=settings, sums=sums)
            state.guard.check()
    seconds = time.perf_counter() - start_s
    with opened_here(val_set, run=run, device=device) as batches:
        models = {"raw": model, "average": average.module}
        found = validate(models, batches, run=run, device=device).scores
    return Trained(
        top1=found["raw"].top1,
        ema_top1=found["average"].top1,
        num_params=sum(parameter.numel() for parameter in model.parameters()),
        seconds=seconds,
    )


def describe_run(*, seed: int, num_epochs: int) -> Run:
    """Build the demo's run for one worker, without its model."""
    run = demo()
    optim = dataclasses.replace(run.optim, num_epochs=num_epochs)
    return dataclasses.replace(run, seed=seed, optim=optim, scale=Scale(num_workers=1))


def mean_spread(values: Sequence[float]) -> str:
    """Format mean and sample deviation."""
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.2f} +- {spread:.2f}"
