"""Memory that runs out costs a step's restart, and the weights are those of a plan."""

from __future__ import annotations

import dataclasses
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipelines.checkpoints.manifest import load_optimizer, load_weights, read_manifest
from pipelines.config import Model, Run
from pipelines.data.batch import Batch
from pipelines.data.shard_set import ShardSet, read_shard_set
from pipelines.driver.failures import StopOnValueError
from pipelines.driver.preflight import check_same
from pipelines.events.channel import Message, WorkerFailed
from pipelines.hardware.device import is_out_of_memory
from pipelines.hardware.row_limit import RowLimit
from pipelines.storage.path import StoragePath
from pipelines.training.metrics import MetricSums
from pipelines.training.state import TrainState
from pipelines.training.step import train_step
from pipelines.worker.checkpointing import MEMORY_FILE, Checkpointer
from tests.small_loops import MemoryGroup
from tests.small_runs import (
    CPU,
    PLAIN_VIT,
    evaluated,
    plain,
    settings_of,
    small_run,
    state_of,
    supply_of,
    train_run,
)
from tests.small_sets import write_set

# The last batch has 10 rows: of four parts of 3 the last has 1, and is padded.
GROUPS = [[5, 9], [7], [1, 8, 4]]
VIT = dataclasses.replace(PLAIN_VIT, drop_path_rate=0.3)
WITH_BATCH_NORM = Model(name="test_resnet", img_size=32)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    folder = tmp_path_factory.mktemp("memory") / "set"
    return read_shard_set(write_set(folder, groups=GROUPS))


class OutOfMemory(torch.autograd.Function):
    """Identity whose backward pass needs more memory than there is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise torch.OutOfMemoryError("out of memory, as the test wants it")


class Limited(nn.Module):
    """Model on a device with memory for so many rows from its n-th call on."""

    def __init__(
        self,
        model: nn.Module,
        *,
        max_rows: int,
        first_call: int = 0,
        in_backward: bool = False,
    ) -> None:
        super().__init__()
        self.model, self.max_rows = model, max_rows
        self.first_call, self.in_backward = first_call, in_backward
        self.rows: list[int] = []
        """Rows of every call."""
        self.kept: list[weakref.ref[Tensor]] = []
        self.num_kept: list[int] = []
        """Activations of failed calls that still were there at each call."""
        stem = next(model.children())
        stem.register_forward_hook(self._after_stem)

    def _after_stem(self, module: nn.Module, args: Any, out: Tensor) -> Tensor:
        is_over = len(out) > self.max_rows and len(self.rows) > self.first_call
        if not is_over:
            return out
        self.kept.append(weakref.ref(out))
        if self.in_backward:
            return OutOfMemory.apply(out)  # pyright: ignore[reportReturnType]
        raise torch.OutOfMemoryError("out of memory, as the test wants it")

    def forward(self, images: Tensor) -> Tensor:
        self.rows.append(len(images))
        self.num_kept.append(sum(ref() is not None for ref in self.kept))
        return self.model(images)


def same(ours: TrainState, theirs: TrainState) -> None:
    assert ours.position == theirs.position
    assert ours.ema is not None
    assert theirs.ema is not None
    for one, other in ((ours.model, theirs.model), (ours.ema, theirs.ema)):
        values = plain(other)
        for name, value in plain(one).items():
            assert torch.equal(value, values[name]), name
    slots = theirs.optimizer.state_dict()["state"]
    for number, of in ours.optimizer.state_dict()["state"].items():
        for name, value in of.items():
            assert torch.equal(value, slots[number][name]), (number, name)


def run_of(shards: ShardSet, *, model: Model = VIT, num_accumulation: int = 1) -> Run:
    return small_run(
        shards.address,
        model=model,
        mixup=0.8,
        cutmix=1.0,
        ema_decay=0.9,
        num_accumulation=num_accumulation,
    )


def losses(logs: list[dict[str, float]]) -> list[tuple[float, ...]]:
    names = ("step", "loss", "top1", "top5", "bad_images")
    return [tuple(log[name] for name in names) for log in logs]


# Each kind of network, of place and of cut with two of the others.
CUTS = [(1, 6, 2), (1, 3, 4), (2, 4, 4)]
CROSSED = [
    (VIT, False, *CUTS[0]),
    (VIT, True, *CUTS[1]),
    (WITH_BATCH_NORM, True, *CUTS[0]),
    (WITH_BATCH_NORM, False, *CUTS[2]),
]
REST = [
    pytest.param(*case, marks=pytest.mark.slow)
    for cut in CUTS
    for model in (VIT, WITH_BATCH_NORM)
    for in_backward in (False, True)
    if (case := (model, in_backward, *cut)) not in CROSSED
]


@pytest.mark.parametrize(
    ("model", "in_backward", "planned", "max_rows", "told"), [*CROSSED, *REST]
)
def test_a_run_that_finds_its_limit_is_the_run_that_was_told_it_bit_for_bit(
    shards: ShardSet,
    model: Model,
    in_backward: bool,
    planned: int,
    max_rows: int,
    told: int,
) -> None:
    run = run_of(shards, model=model, num_accumulation=told)
    wanted = state_of(run)
    wanted_logs = train_run(run, shards=shards, state=wanted).logs

    run = run_of(shards, model=model, num_accumulation=planned)
    found = state_of(run)
    # The second micro-batch of two is what does not fit.
    found.forward = limited = Limited(
        found.model,
        max_rows=max_rows,
        first_call=planned - 1,
        in_backward=in_backward,
    )
    logs = train_run(run, shards=shards, state=found).logs
    same(found, wanted)
    assert losses(logs) == losses(wanted_logs)
    # Once found, it is kept to; and nothing of what failed is there any more.
    assert set(limited.rows[planned + told :]) == {12 // told}
    assert len(limited.kept) == told // planned // 2
    assert set(limited.num_kept) == {0}


def test_memory_that_runs_out_late_changes_nothing_before(
    shards: ShardSet, tmp_path: Path
) -> None:
    """The same batch is more micro-batches from that step on, and whole before it."""
    run, told = run_of(shards), run_of(shards, num_accumulation=2)
    run = dataclasses.replace(run, checkpoint_every_steps=4, num_checkpoints_to_keep=9)
    found = state_of(run)
    found.forward = Limited(found.model, max_rows=6, first_call=4)
    train_run(run, shards=shards, state=found, folder=str(tmp_path))

    resumed, folder = state_of(told), tmp_path / "step_00000004"
    resumed.position = read_manifest(folder).position
    assert resumed.ema is not None
    load_weights(resumed.model, folder)
    load_weights(resumed.ema.module, folder, ema=True)
    load_optimizer(resumed.optimizer, folder)
    train_run(told, shards=shards, state=resumed)
    same(found, resumed)


def batch_of(num: int, *, bad: tuple[int, ...] = (), channels_last: bool) -> Batch:
    source = torch.Generator().manual_seed(3)
    images = torch.randn(num, 3, 4, 4, generator=source)
    if channels_last:
        images = images.to(memory_format=torch.channels_last)
    ids = np.array([-1 if row in bad else 10 + row for row in range(num)])
    return Batch(
        images=images,
        labels=torch.arange(num),
        weights=torch.from_numpy((ids >= 0).astype(np.float32)),
        draw_ids=ids,
        num_bad=len(bad),
        epoch=0,
        index=0,
        micro=1,
        global_rows=num,
        ends_step=True,
        ends_epoch=True,
    )


@pytest.mark.parametrize("channels_last", [False, True])
def test_parts_hold_every_row_once_and_pad_with_their_own(channels_last: bool) -> None:
    batch = batch_of(7, bad=(4,), channels_last=channels_last)
    parts = list(batch.parts(3))
    assert [len(part.images) for part in parts] == [3, 3, 3]
    ids = np.concatenate([part.draw_ids for part in parts])
    assert ids.tolist() == [10, 11, 12, 13, -1, 15, 16, -1, -1]
    labels = torch.cat([part.labels for part in parts]).tolist()
    assert labels == [0, 1, 2, 3, 5, 5, 6, 6, 6]
    assert torch.cat([part.weights for part in parts]).tolist() == [
        *(1, 1, 1, 1, 0, 1, 1, 0, 0)
    ]
    for part in parts:
        assert torch.equal(part.images, batch.images[part.labels])
        assert part.images.is_contiguous(
            memory_format=torch.channels_last
            if channels_last
            else torch.contiguous_format
        )
    assert [part.micro for part in parts] == [3, 4, 5]
    assert [part.ends_step for part in parts] == [False, False, True]
    assert [part.num_bad for part in parts] == [1, 0, 0]
    assert {part.ends_epoch for part in parts} == {True}


def test_a_part_without_images_weighs_nothing() -> None:
    batch = batch_of(6, bad=(4, 5), channels_last=True)
    first, second, third = batch.parts(3)
    assert third.weights.tolist() == [0, 0]
    assert third.draw_ids.tolist() == [-1, -1]
    assert third.images.shape == first.images.shape == second.images.shape


def stepped(state: TrainState, run: Run, **settings: Any) -> None:
    """Take one step with a batch of twelve rows."""
    images = torch.randn(12, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    batch = batch_of(12, channels_last=False)
    batch = dataclasses.replace(batch, images=images, labels=torch.arange(12) % 3)
    train_step(
        state,
        [batch],
        settings=settings_of(run, steps_per_epoch=4, **settings),
        sums=MetricSums(CPU),
    )


def test_one_image_that_does_not_fit_ends_the_run_in_a_line() -> None:
    run = small_run("none")
    state, lines = state_of(run), []
    state.limit.on_lowered = lambda line, max_rows: lines.append(line)
    state.forward = limited = Limited(state.model, max_rows=0, first_call=0)
    with pytest.raises(ValueError, match="expected memory for 1 image at a time") as e:
        stepped(state, run)
    assert "--scale.grad-checkpointing" in str(e.value)
    assert limited.rows == [12, 6, 3, 2, 1]
    assert lines[0] == (
        "training ran out of memory with 12 images at a time: 2 x 6 from here "
        "(the batch stays 12)"
    )
    assert lines[2] == (
        "training ran out of memory with 3 images at a time: 6 x 2 from here "
        "(the batch stays 12)"
    )


def test_an_error_of_another_kind_is_raised_as_it_is() -> None:
    run = small_run("none")
    state = state_of(run)

    def fail(*_: object) -> None:
        raise RuntimeError("the device is broken")

    state.model.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="the device is broken"):
        stepped(state, run)
    assert state.limit.max_rows == 0


def test_memory_that_is_not_there_is_told_from_other_errors() -> None:
    with pytest.raises(RuntimeError) as found:
        torch.empty(1 << 50)
    assert is_out_of_memory(found.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"))
    assert not is_out_of_memory(RuntimeError("shapes do not match"))
    assert not is_out_of_memory(ValueError("can't allocate memory"))


def checkpointer_in(folder: Path, run: Run, **place: int) -> tuple[Any, MemoryGroup]:
    group = MemoryGroup(StoragePath(str(folder)), device=CPU, **place)
    job: Any = type("Job", (), {})()
    job.run, job.train_shards = run, type("Shards", (), {"classes": ("a", "b", "c")})
    return Checkpointer(job, group=group), group


def test_several_workers_keep_the_limit_for_their_restart(tmp_path: Path) -> None:
    """Gradients may be on their way, so the step of a group can't start over."""
    run = small_run("none")
    keeper, group = checkpointer_in(tmp_path, run)
    group.rank, group.world_size = 1, 2
    state = state_of(run)
    state.forward = limited = Limited(state.model, max_rows=6)
    state.limit = RowLimit(on_lowered=keeper._keep_limit)
    with pytest.raises(torch.OutOfMemoryError):
        stepped(state, run, world_size=2, rank=1)
    assert limited.rows == [12]
    found = [event.line for event in group.events if isinstance(event, Message)]
    assert found == [
        "worker 1: training ran out of memory with 12 images at a time: 2 x 6 from "
        "here, after a restart from the last checkpoint (the batch stays 12)"
    ]
    again, _ = checkpointer_in(tmp_path, run)
    state = again.state()
    assert state.limit.max_rows == 6
    state.forward = limited = Limited(state.model, max_rows=6)
    stepped(state, run)
    assert limited.rows == [6, 6]


def test_a_limit_that_can_not_be_read_is_found_again(tmp_path: Path) -> None:
    keeper, _ = checkpointer_in(tmp_path, small_run("none"))
    assert keeper.state().limit.max_rows == 0
    (tmp_path / MEMORY_FILE).write_text('{"max_r')
    assert keeper.state().limit.max_rows == 0


def test_evaluation_halves_its_passes_and_counts_every_image_once(
    shards: ShardSet,
) -> None:
    run = small_run(shards.address)
    model = state_of(run).model

    def supplied() -> Any:
        return supply_of(run, shards=shards, train=False)

    supply = supplied()
    wanted = evaluated(model, supply, run=run)
    supply.close()
    limited, supply = Limited(model, max_rows=3), supplied()
    found = evaluated(limited, supply, run=run)
    supply.close()
    assert found == pytest.approx(wanted, rel=1e-6)
    assert found["num_images"] == 34
    # Eight rows, then four, then two at a time, and no more than that again.
    assert limited.rows[:3] == [8, 4, 2]
    assert set(limited.rows[2:]) == {2}
    assert set(limited.num_kept) == {0}


def test_evaluation_ends_where_one_image_does_not_fit(shards: ShardSet) -> None:
    run = small_run(shards.address)
    supply = supply_of(run, shards=shards, train=False)
    model = Limited(state_of(run).model, max_rows=0)
    with pytest.raises(ValueError, match="for 1 image at a time in evaluation"):
        evaluated(model, supply, run=run)
    supply.close()


@pytest.mark.parametrize(
    ("said", "advice"),
    [
        ("Task was killed due to the node running low on memory.", "; go on with"),
        (
            "The actor died.\nSome common causes include: (1) the process was killed "
            "by the OOM killer due to high memory usage, (2) ray stop",
            "; if memory ran out (dmesg says so), go on with",
        ),
    ],
)
def test_a_process_that_was_killed_for_memory_says_what_to_set(
    said: str, advice: str
) -> None:
    told: list[WorkerFailed] = []
    StopOnValueError(told.append).after_exception(None, {3: RuntimeError(said)})
    first = said.splitlines()[0]
    assert told[0].reason.startswith(f"RuntimeError: {first}{advice} --resume")
    assert "--optim.num-accumulation" in told[0].reason
    assert "\n" not in told[0].reason
    StopOnValueError(told.append).after_exception(None, {3: RuntimeError("broken")})
    assert told[1].reason == "RuntimeError: broken"


def test_a_run_goes_on_in_other_micro_batches_where_the_user_asks(
    shards: ShardSet,
) -> None:
    before = run_of(shards)
    check_same(before, run_of(shards, num_accumulation=2))
    data = dataclasses.replace(before.data, batch_size=6)
    other = dataclasses.replace(before, data=data)
    with pytest.raises(ValueError, match="batch_size"):
        check_same(before, other)
