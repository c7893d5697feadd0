"""A run that was resumed, or that two workers trained, is the plain run."""

from __future__ import annotations

import dataclasses
import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp

from pipelines.checkpoints.manifest import load_optimizer, load_weights, read_manifest
from pipelines.config import Augment
from pipelines.data.batch import Position
from pipelines.data.shard_set import ShardSet, read_shard_set
from tests.small_runs import (
    PLAIN_VIT,
    SO_VIT,
    evaluated,
    plain,
    small_run,
    state_of,
    supply_of,
    train_as_worker,
    train_run,
)
from tests.small_sets import write_set

NUM_ROWS = 37
# Relative. Two workers' gradients are the same sums in another order: over 52 steps
# that moved a loss by 1e-7 to 2e-7 with three seeds (two cores of an AMD EPYC,
# 2026-11-27).
TOLERANCE = 1e-5
AUGMENT = Augment(
    crop_scale=(0.5, 1.0),
    interpolation="random",
    auto_augment="rand-m9-mstd0.5-inc1",
    re_prob=0.5,
)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    folder = tmp_path_factory.mktemp("resume") / "set"
    return read_shard_set(write_set(folder, groups=[[5, 9], [7], [1, 11, 4]]))


KIT = {"optimizer": "muon", "freeze_layers": 2, "unfreeze_epoch": 2}


@pytest.mark.parametrize(
    ("model", "optim"),
    [(PLAIN_VIT, {}), (SO_VIT, {}), (SO_VIT, KIT)],
    ids=["plain", "so_vit", "muon, unfrozen later"],
)
@pytest.mark.parametrize("num_accumulation", [1, 2])
@pytest.mark.parametrize(
    ("step", "name"),
    [(4, "epoch_0001"), (6, "step_00000006")],
    ids=["epoch's end", "mid-epoch"],
)
def test_a_resumed_run_is_the_unbroken_one_bit_for_bit(
    shards: ShardSet,
    tmp_path: Path,
    model: Any,
    optim: dict[str, Any],
    num_accumulation: int,
    step: int,
    name: str,
) -> None:
    run = small_run(
        shards.address,
        model=dataclasses.replace(model, drop_path_rate=0.3),
        mixup=0.8,
        cutmix=1.0,
        ema_decay=0.9,
        num_accumulation=num_accumulation,
        **optim,
    )
    run = dataclasses.replace(
        run, augment=AUGMENT, checkpoint_every_steps=2, num_checkpoints_to_keep=9
    )
    whole = state_of(run)
    logs = train_run(run, shards=shards, state=whole, folder=str(tmp_path)).logs
    resumed = state_of(run, seed=77)
    folder = tmp_path / name
    resumed.position = read_manifest(folder).position
    assert resumed.position == Position(epoch=1, batch=step - 4, step=step)
    assert resumed.ema is not None
    assert whole.ema is not None
    load_weights(resumed.model, folder)
    load_weights(resumed.ema.module, folder, ema=True)
    load_optimizer(resumed.optimizer, folder)
    torch.manual_seed(12345)  # what a new process has drawn must not matter
    rest = train_run(run, shards=shards, state=resumed).logs
    assert resumed.position == whole.position == Position(epoch=3, batch=0, step=12)
    assert [log["loss"] for log in rest] == [log["loss"] for log in logs[step // 2 :]]
    for ours, theirs in (
        (resumed.model, whole.model),
        (resumed.ema.module, whole.ema.module),
    ):
        other = plain(theirs)
        for name, value in plain(ours).items():
            assert torch.equal(value, other[name]), name
    ours, theirs = resumed.optimizer.state_dict(), whole.optimizer.state_dict()
    assert ours["param_groups"] == theirs["param_groups"]
    for number, slots in ours["state"].items():
        for name, value in slots.items():
            other = theirs["state"][number][name]
            is_tensor = isinstance(value, torch.Tensor)
            assert torch.equal(value, other) if is_tensor else value == other


def test_drop_path_and_the_average_are_at_work(shards: ShardSet) -> None:
    """Without this, the test above could pass with both of them idle."""
    run = small_run(shards.address, model=SO_VIT, ema_decay=0.9)
    weights = []
    for rate in (0.0, 0.3):
        model = dataclasses.replace(SO_VIT, drop_path_rate=rate)
        state = state_of(dataclasses.replace(run, model=model))
        train_run(run, shards=shards, state=state)
        weights.append(plain(state.model)["cls_token"])
        assert state.ema is not None
        assert not torch.equal(weights[-1], plain(state.ema.module)["cls_token"])
    assert not torch.equal(*weights)


@pytest.mark.parametrize(
    "optim",
    [{}, {"freeze_layers": 1}, {"freeze_layers": 1, "unfreeze_epoch": 5}],
    ids=["plain", "frozen", "unfrozen later"],
)
def test_two_workers_learn_what_one_learns(
    shards: ShardSet, tmp_path: Path, optim: dict[str, Any]
) -> None:
    """For 52 steps, each loss: of four micro-batches on one, of two on each of two.

    Without BatchNorm, whose statistics are those of a worker's images.
    """
    # A large eps: Adam's first steps would blow up what the order of sums changes.
    run = small_run(
        shards.address, eps=1e-3, lr=5e-3, num_epochs=13, num_accumulation=2, **optim
    )
    scale = dataclasses.replace(run.scale, num_workers=2)
    run = dataclasses.replace(run, scale=scale, log_every_steps=1)
    # torch takes seconds to import: one process does, and the workers fork off it.
    multiprocessing.get_context("forkserver").set_forkserver_preload(
        ["tests.small_runs"]
    )
    mp.start_processes(  # pyright: ignore[reportPrivateImportUsage]
        train_as_worker,
        args=(run, str(tmp_path), 2),
        nprocs=2,
        start_method="forkserver",
    )
    alone = state_of(run)
    logs = train_run(run, shards=shards, state=alone).logs
    supply = supply_of(run, shards=shards, train=False)
    held_out = evaluated(alone.model, supply, run=run)
    supply.close()
    assert held_out["num_images"] == NUM_ROWS
    assert len(logs) == 52
    for rank in range(2):
        found = torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)
        for name, value in plain(alone.model).items():
            ours = found["weights"][name]
            torch.testing.assert_close(ours, value, rtol=1e-4, atol=1e-6)
        assert found["held_out"] == pytest.approx(held_out, rel=1e-4)
        assert found["buffer"].tolist() == [5.0] * 3
        for log, wanted in zip(found["logs"], logs, strict=True):
            for name in ("loss", "top1", "lr", "step", "epoch"):
                assert log[name] == pytest.approx(wanted[name], rel=TOLERANCE)
