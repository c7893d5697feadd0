"""A model in parts on two workers: it learns what a whole one does, and stays whole."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file
from timm.utils.model_ema import ModelEmaV3
from torch import nn
from torch.distributed.tensor import DTensor

from pipelines.checkpoints import snapshot
from pipelines.checkpoints.manifest import load_optimizer, load_weights, read_manifest
from pipelines.checkpoints.snapshot import MODEL_FILE
from pipelines.config import Run
from pipelines.data.batch import Batch
from pipelines.storage.path import StoragePath
from pipelines.training import compiling
from pipelines.training.metrics import MetricSums
from pipelines.training.optimizer import freeze
from pipelines.training.state import (
    TrainState,
    build_state,
    shard_state,
    update_average,
)
from pipelines.training.step import train_step
from pipelines.worker.checkpointing import Checkpointer
from tests.small_runs import CPU, evaluated, meeting, settings_of, small_run
from tests.test_loop import batch_of, pictures

NUM_STEPS = 4


def run_of(sharding: Any, **settings: Any) -> Run:
    run = small_run("none", ema_decay=0.9, clip_grad_norm=1.0, on_nonfinite="skip")
    scale = dataclasses.replace(run.scale, sharding=sharding, num_workers=2, **settings)
    return dataclasses.replace(run, scale=scale, log_every_steps=1)


def share(index: int, *, rank: int, world_size: int) -> Batch:
    """Give one worker's rows of a batch of eight; the second has no number in it."""
    images, labels = pictures(8)
    images = torch.roll(images, index, dims=0)
    labels = torch.roll(labels, index, dims=0)
    if index == 1:
        images[5] = torch.nan
    rows = slice(rank, None, world_size)
    return batch_of(images[rows], labels[rows], index=index, global_rows=8)


def trained(
    state: TrainState,
    run: Run,
    *,
    rank: int,
    world_size: int,
    num_steps: int,
    on_gradients: Callable[[int], None] = lambda step: None,
) -> list[float]:
    losses: list[float] = []
    start = state.position.step
    settings = settings_of(
        run, steps_per_epoch=10, rank=rank, world_size=world_size, images_per_epoch=80
    )
    sums = MetricSums(CPU)

    def micro_batches(index: int) -> Iterator[Batch]:
        yield share(index, rank=rank, world_size=world_size)
        # The gradients are there, and the step is not taken yet.
        on_gradients(state.position.step)

    state.train_mode()
    for index in range(start, start + num_steps):
        train_step(state, micro_batches(index), settings=settings, sums=sums)
        state.guard.check()
        losses.append(sums.total()["loss"])
    return losses


def keep(state: TrainState, run: Run, *, rank: int, folder: Path) -> None:
    """Keep a state as a worker does; only the first one's host sees it whole."""
    classes = ("a", "b", "c")
    job: Any = SimpleNamespace(run=run, train_shards=SimpleNamespace(classes=classes))
    group: Any = SimpleNamespace(
        rank=rank, folder=StoragePath(str(folder.parent)), post=lambda item: None
    )
    keeper = Checkpointer(job, group=group)
    with pytest.MonkeyPatch.context() as patch:
        if rank:
            patch.delattr(snapshot, "download")
            patch.setattr(snapshot.copied, "__kwdefaults__", {"copy": None})
        keeper.keep(state, name=folder.name, metrics={}, can_wait=True)
        keeper.close(is_done=True)
    if dist.is_initialized():
        dist.barrier()


def restored(run: Run, folder: Path, *, world_size: int) -> TrainState:
    state = build_state(
        run,
        num_classes=3,
        device=CPU,
        world_size=world_size,
        load=lambda model: load_weights(model, folder),
        load_average=lambda average: load_weights(average, folder, ema=True),
    )
    load_optimizer(state.optimizer, folder)
    shard_state(state.optimizer)
    state.position = read_manifest(folder).position
    return state


def work(rank: int, folder: Path) -> None:
    """Be one of two workers."""
    with meeting(folder, rank=rank, num_workers=2):
        train_sharded(rank, folder)
        train_with_short_gradients(rank, folder)
        train_frozen(rank, folder)


def train_sharded(rank: int, folder: Path) -> None:
    """Train, keep and go on; what was found is left in files."""
    run = run_of("fsdp")
    state = build_state(run, num_classes=3, device=CPU, world_size=2)
    weights = [p for p in state.model.parameters() if p.ndim > 1]
    assert all(isinstance(weight, DTensor) for weight in weights)
    assert any(w.to_local().numel() < w.numel() for w in weights)  # pyright: ignore
    losses = trained(state, run, rank=rank, world_size=2, num_steps=NUM_STEPS)
    keep(state, run, rank=rank, folder=folder / "sharded")
    assert state.ema is not None
    held_out = evaluated(
        state.ema.module,
        [
            dataclasses.replace(
                share(0, rank=rank, world_size=2), ends_epoch=True, ends_step=True
            )
        ],
        run=run,
    )
    again = restored(run, folder / "sharded", world_size=2)
    trained(again, run, rank=rank, world_size=2, num_steps=2)
    keep(again, run, rank=rank, folder=folder / "again")
    trained(state, run, rank=rank, world_size=2, num_steps=2)
    keep(state, run, rank=rank, folder=folder / "unbroken")
    torch.save((losses, held_out), folder / f"rank{rank}.pt")


def train_with_short_gradients(rank: int, folder: Path) -> None:
    """Train whole models whose gradients travel in bfloat16; one can't compile."""
    lines: list[str] = []
    run = run_of("none", gradient_dtype="bfloat16", compile=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiling, "why_not", lambda device: "no g++" if rank else "")
        state = build_state(
            run, num_classes=3, device=CPU, world_size=2, tell=lines.append
        )
    assert isinstance(state.forward, nn.parallel.DistributedDataParallel)
    are_short: list[bool] = []

    def look(step: int) -> None:
        grads = [p.grad for p in state.model.parameters() if p.grad is not None]
        if step != 1:  # that one is no number
            are_short.append(all(torch.equal(g, g.bfloat16().float()) for g in grads))

    losses = trained(
        state, run, rank=rank, world_size=2, num_steps=NUM_STEPS, on_gradients=look
    )
    torch.save((losses, lines, are_short), folder / f"short{rank}.pt")


FROZEN = ({"freeze_layers": 1}, {"freeze_layers": 2, "unfreeze_epoch": 2})


def train_frozen(rank: int, folder: Path) -> None:
    """Train with the first layers frozen, sharded and not; keep the weights."""
    for number, optim in enumerate(FROZEN):
        for sharding in ("fsdp", "none"):
            run = run_of(sharding)
            run = dataclasses.replace(
                run, optim=dataclasses.replace(run.optim, **optim)
            )
            state = build_state(run, num_classes=3, device=CPU, world_size=2)
            trained(state, run, rank=rank, world_size=2, num_steps=NUM_STEPS)
            keep(state, run, rank=rank, folder=folder / f"frozen{number}_{sharding}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharding")
    mp.start_processes(work, args=(folder,), nprocs=2, start_method="forkserver")  # pyright: ignore
    return folder


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Read all tensors of a checkpoint, the optimiser's too."""
    run = run_of("none")
    state = restored(run, folder, world_size=1)
    assert state.ema is not None
    found = {f"model.{k}": v for k, v in state.model.state_dict().items()}
    found |= {f"ema.{k}": v for k, v in state.ema.module.state_dict().items()}
    for at, of in enumerate(state.optimizer.state.values()):
        found |= {f"{at}.{name}": value for name, value in of.items()}
    return found


def test_it_learns_what_a_whole_one_learns(folder: Path) -> None:
    run = run_of("none")
    state = build_state(run, num_classes=3, device=CPU)
    losses = trained(state, run, rank=0, world_size=1, num_steps=NUM_STEPS)
    found, held_out = torch.load(folder / "rank0.pt")
    assert found == pytest.approx(losses, rel=1e-5)
    assert held_out["num_images"] == 8
    keep(state, run, rank=0, folder=folder / "whole")
    for name, value in tensors_of(folder / "whole").items():
        other = tensors_of(folder / "sharded")[name]
        torch.testing.assert_close(other, value, rtol=1e-3, atol=1e-5, msg=name)


def test_gradients_may_travel_in_bfloat16(folder: Path) -> None:
    losses, _, are_short = torch.load(folder / "short0.pt")
    assert are_short == [True] * (NUM_STEPS - 1)
    in_float32, _ = torch.load(folder / "rank0.pt")
    assert losses == pytest.approx(in_float32, rel=1e-2)
    assert losses != in_float32


def test_workers_compile_together_or_not_at_all(folder: Path) -> None:
    told = [torch.load(folder / f"short{rank}.pt")[1] for rank in range(2)]
    assert told[0] == told[1]
    (line,) = told[0]
    assert line.startswith("steps are not compiled, and slower: torch.compile needs a")
    assert line.endswith("worker 1 got: no g++")


@pytest.mark.parametrize("number", [0, 1])
def test_frozen_layers_stay_whether_sharded_or_not(folder: Path, number: int) -> None:
    model = build_state(run_of("none"), num_classes=3, device=CPU).model
    fresh = model.state_dict()
    optim = dataclasses.replace(run_of("none").optim, **FROZEN[number])
    frozen = freeze(model, optim=optim).names
    sharded, whole = (
        load_file(folder / f"frozen{number}_{sharding}" / MODEL_FILE)
        for sharding in ("fsdp", "none")
    )
    for name, value in sharded.items():
        torch.testing.assert_close(value, whole[name], rtol=1e-3, atol=1e-5, msg=name)
        assert torch.equal(value, fresh[name]) == (name in frozen), name


def test_it_goes_on_from_its_checkpoint_bit_for_bit(folder: Path) -> None:
    unbroken = tensors_of(folder / "unbroken")
    for name, value in tensors_of(folder / "again").items():
        assert torch.equal(value, unbroken[name]), name


def test_the_average_moves_as_timms_does() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    ours, theirs = ModelEmaV3(model, decay=0.9), ModelEmaV3(model, decay=0.9)
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    for parameter in model.parameters():
        parameter.data += 1
    update_average(ours.module, model, decay=0.9)
    theirs.update(model)
    wanted = theirs.module.state_dict()
    for name, value in ours.module.state_dict().items():
        assert torch.equal(value, wanted[name]), name
    assert ours.module.state_dict()["1.num_batches_tracked"] == 1
