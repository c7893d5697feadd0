"""The loop: it learns, weighs every image once, and follows its schedule."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipelines.config import Run
from pipelines.data.batch import Batch, Position
from pipelines.data.shard_set import ShardSet, read_shard_set
from pipelines.hardware import device
from pipelines.training.metrics import smooth_targets, soft_cross_entropy
from pipelines.training.optimizer import learning_rate
from pipelines.training.state import TrainState
from pipelines.training.step import Forward
from tests.small_loops import NotingLoop, small_loop
from tests.small_runs import (
    CPU,
    evaluated,
    settings_of,
    small_run,
    state_of,
    train_run,
)
from tests.small_sets import write_set

NUM_ROWS = 37
RUN = small_run("none")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    folder = tmp_path_factory.mktemp("loop") / "set"
    return read_shard_set(write_set(folder, groups=[[5, 9], [7], [1, 11, 4]]))


def pictures(num: int) -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(3)
    images = torch.randn(num, 3, 16, 16, generator=source)
    return images, torch.randint(0, 3, (num,), generator=source)


def batch_of(
    images: Tensor, labels: Tensor, *, num_real: int | None = None, **place: Any
) -> Batch:
    num_real = len(labels) if num_real is None else num_real
    given: dict[str, Any] = {
        "epoch": 0,
        "index": 0,
        "micro": 0,
        "global_rows": num_real,
        "ends_step": True,
        "ends_epoch": False,
        "draw_ids": np.arange(len(labels)),
    }
    weights = (torch.arange(len(labels)) < num_real).float()
    return Batch(images=images, labels=labels, weights=weights, **(given | place))


def looped(state: TrainState, items: Iterable[Batch], *, run: Any = RUN) -> NotingLoop:
    """Train on batches as a worker does."""
    settings = settings_of(run, steps_per_epoch=10, images_per_epoch=100)
    with small_loop(state, items, settings=settings) as loop:
        loop.train()
    return loop


def run_loop(
    state: TrainState, items: Iterable[Batch], *, run: Any = RUN
) -> list[dict[str, float]]:
    """Train on batches as a worker does; give what it logs."""
    return looped(state, items, run=run).logs


def gradients_of(items: list[Batch], *, run: Any = RUN) -> dict[str, Tensor]:
    """Give the gradient that the loop's optimiser sees at its one step."""
    state = state_of(run)
    seen: dict[str, Tensor] = {}

    def keep(*_: object) -> None:
        for name, parameter in state.model.named_parameters():
            assert parameter.grad is not None
            seen[name] = parameter.grad.clone()

    state.optimizer.register_step_pre_hook(keep)
    run_loop(state, items, run=run)
    return seen


def mean_loss_gradients(images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    model = state_of(RUN).model.train()
    targets = smooth_targets(labels, num_classes=3, smoothing=0.1)
    soft_cross_entropy(model(images), targets).mean().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def close(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-4, atol=1e-6)


def test_the_loop_learns_64_images_by_heart() -> None:
    run = small_run("none", lr=5e-3, label_smoothing=0.0, num_epochs=10)
    images, labels = pictures(64)
    state = state_of(run)
    items = [batch_of(images, labels, index=i, ends_epoch=i == 59) for i in range(60)]
    before = evaluated(state.model, items[-1:], run=run)
    logs = run_loop(state, items, run=run)
    after = evaluated(state.model, items[-1:], run=run)
    assert before["top1"] < 70
    assert after["top1"] == 100
    assert after["loss"] < 0.1 < before["loss"]
    assert logs[-1]["loss"] < 0.2


def test_filling_rows_change_neither_loss_nor_gradient() -> None:
    images, labels = pictures(5)
    filled = [torch.cat([part, part[:3]]) for part in (images, labels)]
    wanted = mean_loss_gradients(images, labels)
    close(gradients_of([batch_of(images, labels)]), wanted)
    close(gradients_of([batch_of(*filled, num_real=5)]), wanted)
    logs = [
        run_loop(state_of(RUN), [dataclasses.replace(item, ends_epoch=True)])[0]
        for item in (batch_of(images, labels), batch_of(*filled, num_real=5))
    ]
    for name in ("loss", "top1", "top5"):
        assert logs[0][name] == pytest.approx(logs[1][name], rel=1e-5)


def test_accumulated_gradients_are_those_of_the_whole_batch() -> None:
    images, labels = pictures(12)
    parts = [
        batch_of(
            images[start : start + 4],
            labels[start : start + 4],
            micro=micro,
            global_rows=12,
            ends_step=micro == 2,
        )
        for micro, start in enumerate((0, 4, 8))
    ]
    close(gradients_of(parts), gradients_of([batch_of(images, labels)]))


def test_workers_talk_at_the_last_micro_batch_only() -> None:
    class Wrapped(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module, self.calls, self.quiet = module, [], False

        def forward(self, images: Tensor) -> Tensor:
            self.calls.append(self.quiet)
            return self.module(images)

        @contextlib.contextmanager
        def no_sync(self) -> Iterator[None]:
            self.quiet = True
            yield
            self.quiet = False

    state = state_of(RUN)
    state.forward = wrapped = Wrapped(state.model)
    images, labels = pictures(4)
    run_loop(
        state,
        [
            batch_of(images, labels, micro=micro, ends_step=micro == 2, index=index)
            for index in range(2)
            for micro in range(3)
        ],
    )
    assert wrapped.calls == [True, True, False] * 2
    assert state.position == Position(epoch=0, batch=2, step=2)


def test_rates_are_set_by_step_and_positions_follow_the_batches(
    shards: ShardSet,
) -> None:
    run = small_run(shards.address, num_epochs=3, cooldown_epochs=1)
    state = state_of(run)
    rates = []
    state.optimizer.register_step_pre_hook(
        lambda optimizer, *_: rates.append([g["lr"] for g in optimizer.param_groups])
    )
    loop = train_run(run, shards=shards, state=state)
    logs, ends = loop.logs, loop.kept("epoch")
    wanted = [learning_rate(i, optim=run.optim, steps_per_epoch=4) for i in range(16)]
    assert rates == [[rate, rate] for rate in wanted]
    assert ends == [Position(epoch=e, batch=0, step=4 * e) for e in range(1, 5)]
    # Every two steps, an epoch's last included, with that step's rate.
    assert [log["step"] for log in logs] == list(range(2, 17, 2))
    assert [log["lr"] for log in logs] == wanted[1::2]
    assert {"loss", "top1", "top5", "images_per_s", "waiting_share"} <= logs[0].keys()
    assert all(0 <= log["waiting_share"] <= 1 for log in logs)


def test_gradients_are_clipped_to_a_norm() -> None:
    images, labels = pictures(8)
    norms = []
    for bound in (0.0, 0.01):
        run = small_run("none", clip_grad_norm=bound)
        gradients = gradients_of([batch_of(images, labels)], run=run)
        norms.append(math.sqrt(sum(float((g**2).sum()) for g in gradients.values())))
    assert norms[0] > 0.1
    assert norms[1] == pytest.approx(0.01, rel=1e-3)


def dtypes_of(run: Run) -> set[torch.dtype]:
    """Find what logits are in that the run trains on, and evaluates."""
    state, images_labels = state_of(run), pictures(4)
    logits = Forward.of(run, device=CPU)(state.model, images_labels[0])
    found = {logits.dtype}

    def note(module: nn.Module, args: Any, out: Any) -> None:
        found.add(out.dtype)

    state.model.register_forward_hook(note)
    run_loop(state, [batch_of(*images_labels)], run=run)
    return found


@pytest.mark.parametrize("has", [True, False])
def test_half_precision_follows_the_run_and_the_device(
    has: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "has_bfloat16", lambda device: has)
    dtypes = []
    for amp in ("auto", "off"):
        run = dataclasses.replace(RUN, scale=dataclasses.replace(RUN.scale, amp=amp))
        dtypes.append(dtypes_of(run))
    assert dtypes == [{torch.bfloat16 if has else torch.float32}, {torch.float32}]


def test_a_device_without_the_instructions_has_no_bfloat16(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for capabilities, has in (({}, False), ({"avx512_bf16": True}, True)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda c=capabilities: c)
        assert device.has_bfloat16(CPU) == has
    assert not device.has_bfloat16(torch.device("meta"))


def test_a_run_in_bfloat16_learns_too() -> None:
    """Also on a CPU that emulates it: losses and weights stay float32."""
    images, labels = pictures(16)
    run = small_run("none", lr=5e-3, label_smoothing=0.0, num_epochs=10)
    run = dataclasses.replace(run, scale=dataclasses.replace(run.scale, amp="auto"))
    state = state_of(run)
    items = [batch_of(images, labels, index=i, ends_epoch=i == 39) for i in range(40)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device, "has_bfloat16", lambda device: True)
        logs = run_loop(state, items, run=run)
    assert logs[-1]["loss"] < 0.3 * logs[0]["loss"]
    assert {p.dtype for p in state.model.parameters()} == {torch.float32}
