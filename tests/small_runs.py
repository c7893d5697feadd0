"""Train small models in this process, on shards, through everything but Ray."""

from __future__ import annotations

import dataclasses
import datetime
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
import torch.distributed as dist
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn

import sovit
from pipelines.checkpoint import Position, build_model
from pipelines.config import Data, Model, Optim, Run, Scale
from pipelines.ingest.batch import Batch
from pipelines.ingest.decoder import decode_rows, make_decoder
from pipelines.ingest.feed import Shape, batches
from pipelines.ingest.footers import ShardSet, read_shard_set
from pipelines.ingest.plan import Unit
from pipelines.ingest.stream import EpochStream, evaluation_plan, training_plan
from pipelines.loop import LoopSettings, TrainState, evaluate, share_buffers, train
from pipelines.optim import build_optimizer
from tests.small_sets import worker_tables

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
    """Describe a run on a small set that is trained and evaluated on."""
    return Run(
        recipe="small",
        model=model,
        data=Data(
            train=address,
            val=address,
            batch_size=batch_size,
            eval_batch_size=8,
            shuffle_rows=2 * batch_size,
            crop_scale=(0.5, 1.0),
            decoder="torch",
        ),
        optim=dataclasses.replace(OPTIM, **optim),
        # Equalities are shown in float32.
        scale=Scale(amp="off"),
        log_every_steps=2,
    )


def stream_of(
    run: Run,
    *,
    shards: ShardSet,
    train: bool = True,
    start: Position | None = None,
    num_workers: int = 1,
    worker: int = 0,
) -> EpochStream:
    """Open one worker's stream of tables, read in this process."""

    def plan(epoch: int) -> Any:
        if train:
            return training_plan(shards, data=run.data, seed=run.seed, epoch=epoch)
        return evaluation_plan(shards, data=run.data, epoch=epoch)

    def open_units(units: list[Unit] | None) -> Iterator[pa.Table]:
        assert units is not None
        return worker_tables(
            units, shards=shards, num_workers=num_workers, worker=worker
        )

    return EpochStream(
        plan=plan,
        open_units=open_units,
        units_per_epoch=plan(0).num_units,
        start=start or Position(),
        num_epochs=run.optim.total_epochs,
    )


def batches_of(
    run: Run,
    *,
    stream: EpochStream,
    train: bool = True,
    num_workers: int = 1,
    device: torch.device = CPU,
) -> Iterator[Batch]:
    """Decode a stream as a worker does."""
    batch_size = run.data.batch_size if train else run.data.eval_batch_size
    shape = Shape(
        share_rows=math.ceil(batch_size / num_workers),
        num_micro=run.optim.num_accumulation if train else 1,
    )
    size = run.model.img_size
    decoder = make_decoder(
        run.data, img_size=size, batch_size=shape.micro_rows, train=train, device=device
    )
    decode = decode_rows(
        decoder, data=run.data, img_size=size, seed=run.seed, train=train
    )
    return batches(stream.tables(), shape=shape, decode=decode, device=device)


def state_of(run: Run, *, num_classes: int = 3, seed: int | None = None) -> TrainState:
    """Build a run's model, average and optimiser."""
    torch.manual_seed(run.seed if seed is None else seed)
    model = build_model(run.model, num_classes=num_classes)
    decay = run.optim.ema_decay
    return TrainState(
        model=model,
        forward=model,
        optimizer=build_optimizer(model, optim=run.optim),
        ema=ModelEmaV3(model, decay=decay) if decay else None,
    )


def settings_of(run: Run, *, steps_per_epoch: int, **settings: Any) -> LoopSettings:
    """Describe a loop on the CPU over three classes."""
    return LoopSettings(
        run=run,
        num_classes=3,
        steps_per_epoch=steps_per_epoch,
        device=CPU,
        **settings,
    )


def train_run(
    run: Run,
    *,
    shards: ShardSet,
    state: TrainState,
    num_workers: int = 1,
    worker: int = 0,
    on_epoch_end: Callable[[TrainState], None] = lambda state: None,
) -> list[dict[str, float]]:
    """Train from the state's position to the end; give what was logged."""
    stream = stream_of(
        run,
        shards=shards,
        start=state.position,
        num_workers=num_workers,
        worker=worker,
    )
    logs: list[dict[str, float]] = []
    plan = training_plan(shards, data=run.data, seed=run.seed, epoch=0)

    def end_epoch(state: TrainState) -> None:
        on_epoch_end(state)
        stream.epoch_ended(state.position.epoch)

    train(
        state,
        batches_of(run, stream=stream, num_workers=num_workers),
        settings=settings_of(
            run,
            steps_per_epoch=plan.num_batches,
            world_size=num_workers,
            rank=worker,
        ),
        on_log=lambda metrics, position: logs.append({**metrics, **vars(position)}),
        on_epoch_end=end_epoch,
    )
    return logs


def train_as_worker(rank: int, run: Run, folder: str, num_workers: int) -> None:
    """Be one of several processes that train together; rank 0 keeps the outcome."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meet",
        rank=rank,
        world_size=num_workers,
        timeout=datetime.timedelta(seconds=120),
    )
    try:
        kept = _train_together(run, rank=rank, num_workers=num_workers)
        torch.save(kept, Path(folder) / f"rank{rank}.pt")
    finally:
        dist.destroy_process_group()


def _train_together(run: Run, *, rank: int, num_workers: int) -> dict[str, Any]:
    shards = read_shard_set(run.data.train)
    state = state_of(run)
    state.forward = nn.parallel.DistributedDataParallel(
        state.model, broadcast_buffers=False
    )
    logs = train_run(
        run, shards=shards, state=state, num_workers=num_workers, worker=rank
    )
    buffers = nn.BatchNorm1d(3)
    buffers.running_mean = torch.full((3,), float(rank + 5))
    share_buffers(buffers)
    stream = stream_of(
        run, shards=shards, train=False, num_workers=num_workers, worker=rank
    )
    held_out = evaluate(
        state.model,
        batches_of(run, stream=stream, train=False, num_workers=num_workers),
        settings=settings_of(run, steps_per_epoch=1),
    )
    return {
        "weights": plain(state.model),
        "logs": logs,
        "held_out": held_out,
        "buffer": buffers.running_mean,
    }


def plain(module: nn.Module) -> dict[str, Tensor]:
    """Copy a module's parameters and buffers."""
    return {name: value.clone() for name, value in module.state_dict().items()}
