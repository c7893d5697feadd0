"""The loop: it learns, weighs every image once, and follows its schedule."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipelines.data.batch import Batch
from pipelines.data.position import Position
from pipelines.data.shard_set import ShardSet, read_shard_set
from pipelines.hardware import device
from pipelines.training import throughput as timing
from pipelines.training.loop import (
    BadImagesError,
    TrainState,
    train,
)
from pipelines.training.mixup import smooth_targets, soft_cross_entropy
from pipelines.training.optimizer import learning_rate
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


def run_loop(
    state: TrainState, items: list[Batch], *, run: Any = RUN, **callbacks: Any
) -> list[dict]:
    logs: list[dict] = []
    train(
        state,
        items,
        settings=settings_of(run, steps_per_epoch=10, images_per_epoch=100),
        on_log=lambda metrics, _: logs.append(dict(metrics)),
        on_epoch_end=callbacks.pop("on_epoch_end", lambda _: None),
        **callbacks,
    )
    return logs


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
    before = evaluated(
        state.model, items[-1:], settings=settings_of(run, steps_per_epoch=1)
    )
    logs = run_loop(state, items, run=run)
    after = evaluated(
        state.model, items[-1:], settings=settings_of(run, steps_per_epoch=1)
    )
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
    rates, ends = [], []
    state.optimizer.register_step_pre_hook(
        lambda optimizer, *_: rates.append([g["lr"] for g in optimizer.param_groups])
    )
    logs = train_run(
        run,
        shards=shards,
        state=state,
        on_epoch_end=lambda state: ends.append(state.position),
    )
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


@pytest.mark.parametrize("has", [True, False])
def test_half_precision_follows_the_run_and_the_device(
    has: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "has_bfloat16", lambda device: has)
    dtypes = []
    for amp in ("auto", "off"):
        run = dataclasses.replace(RUN, scale=dataclasses.replace(RUN.scale, amp=amp))
        with settings_of(run, steps_per_epoch=1).autocast:
            dtypes.append((torch.ones(2, 2) @ torch.ones(2, 2)).dtype)
    assert dtypes == [torch.bfloat16 if has else torch.float32, torch.float32]


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


def some_batches(num: int, **places: Any) -> list[Batch]:
    images, labels = pictures(4)
    return [
        batch_of(images, labels, index=i, **({"ends_epoch": i == num - 1} | places))
        for i in range(num)
    ]


def test_checkpoints_come_by_steps_and_not_twice_at_an_epochs_end() -> None:
    run = dataclasses.replace(RUN, checkpoint_every_steps=3)
    kept, ended = [], []
    items = [*some_batches(6), *some_batches(5)]
    run_loop(
        state_of(run),
        items,
        run=run,
        on_checkpoint=lambda state: kept.append(state.position),
        on_epoch_end=lambda state: ended.append(state.position),
    )
    assert kept == [
        Position(epoch=0, batch=3, step=3),
        Position(epoch=1, batch=3, step=9),
    ]
    assert ended == [Position(epoch=1, step=6), Position(epoch=2, step=11)]


def test_checkpoints_come_by_time_when_metrics_are_logged(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = dataclasses.replace(RUN, checkpoint_every_minutes=1.0)  # logs every 2 steps
    kept: list[int] = []
    clock = {"now": 0.0}
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock["now"])

    def slowly(items: list[Batch]) -> Iterator[Batch]:
        for item in items:
            clock["now"] += 25.0
            yield item

    run_loop(
        state_of(run),
        slowly(some_batches(12, ends_epoch=False)),  # pyright: ignore
        run=run,
        on_checkpoint=lambda state: kept.append(state.position.step),
    )
    # 100 s after the start and after every one: the first log past 60 s.
    assert kept == [4, 8, 12]
    never = dataclasses.replace(run, checkpoint_every_minutes=0.0)
    run_loop(
        state_of(never),
        slowly(some_batches(6, ends_epoch=False)),  # pyright: ignore
        run=never,
        on_checkpoint=lambda state: kept.append(-1),
    )
    assert kept == [4, 8, 12]


def test_a_checkpoint_is_no_part_of_the_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    run = dataclasses.replace(RUN, checkpoint_every_steps=3, log_every_steps=4)
    clock = {"now": 0.0}
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock["now"])

    def pass_time(seconds: float) -> None:
        clock["now"] += seconds

    def slowly(items: list[Batch]) -> Iterator[Batch]:
        for item in items:
            pass_time(0.5)
            yield item

    logs = run_loop(
        state_of(run),
        slowly(some_batches(4)),  # pyright: ignore
        run=run,
        on_checkpoint=lambda state: pass_time(100),
    )
    assert [log["images_per_s"] for log in logs] == [8.0]
    assert [log["waiting_share"] for log in logs] == [1.0]


def test_bad_images_are_counted_by_epoch_and_stop_a_run_past_their_share() -> None:
    images, labels = pictures(4)

    def items(*bad: int) -> list[Batch]:
        last = len(bad) - 1
        return [
            batch_of(
                images, labels, num_bad=num, index=i, num_real=4, ends_epoch=i == last
            )
            for i, num in enumerate(bad)
        ]

    data = dataclasses.replace(RUN.data, max_bad_share=0.03)  # of 100 images
    run = dataclasses.replace(RUN, data=data)
    logs = run_loop(state_of(run), [*items(1, 0, 1, 1), *items(0, 1)], run=run)
    assert [log["bad_images"] for log in logs] == [1, 3, 1]
    with pytest.raises(BadImagesError, match=r"at most 3\.00% of 100 .* came 4"):
        run_loop(state_of(run), items(1, 1, 1, 1, 0), run=run)
