"""Train small models in this process, on shards, through everything but Ray."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn

import sovit
from pipelines.config import Augment, Data, Model, Optim, Run, Scale
from pipelines.data.batch import Batch, Position
from pipelines.data.loader import Loader, Plans
from pipelines.data.shard_set import ShardSet, read_shard_set
from pipelines.evaluation.measure import validate
from pipelines.training.model import build_model
from pipelines.training.nonfinite import NonFiniteGuard
from pipelines.training.optimizer import build_optimizer, freeze
from pipelines.training.state import TrainState, share_buffers, wrapped
from pipelines.training.step import TrainSettings
from tests.small_loops import NotingLoop, small_loop
from tests.small_sets import WorkerOpener

CPU = torch.device("cpu")
# No BatchNorm: its statistics would depend on how a batch lies on the workers.
PLAIN_VIT = Model(
    name="test_vit",
    img_size=16,
    kwargs={"img_size": 16, "patch_size": 4, "depth": 2, "embed_dim": 32},
)
SO_VIT = Model(
    name="so_vit_7",
    img_size=32,
    drop_path_rate=0.3,
    pooling=sovit.Pooling(reduced_dim=(6, 4)),
    kwargs={"depth": 2, "embed_dim": 32, "num_heads": 2},
)
OPTIM = Optim(lr=1e-3, num_epochs=3, warmup_epochs=1, label_smoothing=0.1)


def small_run(
    address: str, *, model: Model = PLAIN_VIT, batch_size: int = 12, **optim: Any
) -> Run:
    """Build a run that trains and evaluates on one small set."""
    return Run(
        recipe="small",
        model=model,
        data=Data(
            train=address,
            val=address,
            batch_size=batch_size,
            eval_batch_size=8,
            shuffle_rows=2 * batch_size,
            decoder="torch",
        ),
        augment=Augment(crop_scale=(0.5, 1.0)),
        optim=dataclasses.replace(OPTIM, **optim),
        # Equalities are shown in float32.
        scale=Scale(amp="off"),
        log_every_steps=2,
    )


def supply_of(
    run: Run,
    *,
    shards: ShardSet,
    train: bool = True,
    start: Position | None = None,
    num_workers: int = 1,
    worker: int = 0,
    **settings: Any,
) -> Loader:
    """Supply one worker's batches, read and planned in this process."""
    decodes = run.data.decode_on == "readers"
    opener = WorkerOpener(
        shards,
        num_workers=num_workers,
        worker=worker,
        decode=run.pixels(train=train) if decodes else None,
    )
    supply = Loader(
        shards,
        run=run,
        train=train,
        start=start or Position(),
        opener=opener,
        device=CPU,
        world_size=num_workers,
        **settings,
    )
    supply.start()
    return supply


def state_of(run: Run, *, num_classes: int = 3, seed: int | None = None) -> TrainState:
    """Build a run's model, average, optimiser and guard."""
    torch.manual_seed(run.seed if seed is None else seed)
    model = build_model(run.model, num_classes=num_classes)
    decay = run.optim.ema_decay
    frozen = freeze(model, optim=run.optim)
    optimizer = build_optimizer(model, optim=run.optim)
    return TrainState(
        model=model,
        forward=model,
        optimizer=optimizer,
        frozen=frozen,
        ema=ModelEmaV3(model, decay=decay) if decay else None,
        guard=NonFiniteGuard(model, optimizer, optim=run.optim, device=CPU),
    )


def settings_of(run: Run, *, steps_per_epoch: int, **settings: Any) -> TrainSettings:
    """Return the settings of a training on the CPU over three classes."""
    return TrainSettings(
        run=run,
        num_classes=3,
        steps_per_epoch=steps_per_epoch,
        images_per_epoch=settings.pop("images_per_epoch", 1000),
        device=CPU,
        **settings,
    )


def evaluated(
    model: nn.Module, items: Iterable[Batch], *, run: Run
) -> dict[str, float]:
    """Evaluate one model on the CPU."""
    found = validate({"raw": model}, items, run=run, device=CPU)
    return found.primary.values()


def train_run(
    run: Run,
    *,
    shards: ShardSet,
    state: TrainState,
    num_workers: int = 1,
    worker: int = 0,
    folder: str = "",
) -> NotingLoop:
    """Train from the state's position to the end; checkpoints stay in a folder."""
    supply = supply_of(
        run,
        shards=shards,
        start=state.position,
        num_workers=num_workers,
        worker=worker,
    )
    epoch = Plans(shards=shards, run=run, train=True).shape(0)
    settings = settings_of(
        run,
        steps_per_epoch=epoch.num_batches,
        images_per_epoch=epoch.num_images,
        world_size=num_workers,
        rank=worker,
    )
    try:
        with small_loop(
            state, supply, settings=settings, folder=folder, classes=shards.classes
        ) as loop:
            loop.train()
    finally:
        supply.close()
    return loop


@contextlib.contextmanager
def meeting(folder: str | Path, *, rank: int, num_workers: int) -> Iterator[None]:
    """Join a process group that meets by a file in a folder."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meet",
        rank=rank,
        world_size=num_workers,
        timeout=datetime.timedelta(seconds=600),
    )
    try:
        yield
    finally:
        dist.destroy_process_group()


def train_as_worker(rank: int, run: Run, folder: str, num_workers: int) -> None:
    """Train as one rank of a process group; save this rank's outcome."""
    with meeting(folder, rank=rank, num_workers=num_workers):
        kept = _train_together(run, rank=rank, num_workers=num_workers)
        torch.save(kept, Path(folder) / f"rank{rank}.pt")


def _train_together(run: Run, *, rank: int, num_workers: int) -> dict[str, Any]:
    shards = read_shard_set(run.data.train)
    state = state_of(run)
    state.forward = wrapped(state.model, run=run, device=CPU, world_size=num_workers)
    logs = train_run(
        run, shards=shards, state=state, num_workers=num_workers, worker=rank
    ).logs
    buffers = nn.BatchNorm1d(3)
    buffers.running_mean = torch.full((3,), float(rank + 5))
    share_buffers(buffers)
    supply = supply_of(
        run, shards=shards, train=False, num_workers=num_workers, worker=rank
    )
    held_out = evaluated(state.model, supply, run=run)
    supply.close()
    return {
        "weights": plain(state.model),
        "logs": logs,
        "held_out": held_out,
        "buffer": buffers.running_mean,
    }


def plain(module: nn.Module) -> dict[str, Tensor]:
    """Copy a module's parameters and buffers."""
    return {name: value.clone() for name, value in module.state_dict().items()}
