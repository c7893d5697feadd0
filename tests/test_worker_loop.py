"""The workers' loop: what a step takes, and when it logs, writes and ends."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pipelines.data.batch import Batch, Position
from pipelines.errors import BadImagesError
from pipelines.worker import throughput as timing
from pipelines.worker.audit_log import AuditLog, trained
from tests.small_loops import NotingCheckpointer, small_loop
from tests.small_runs import plain, settings_of, state_of
from tests.test_loop import RUN, batch_of, looped, pictures, run_loop


def parts_of_steps(num: int) -> list[Batch]:
    """Make steps of three micro-batches each."""
    images, labels = pictures(4)
    return [
        batch_of(images, labels, index=index, micro=micro, ends_step=micro == 2)
        for index in range(num)
        for micro in range(3)
    ]


def some_batches(num: int, **places: Any) -> list[Batch]:
    images, labels = pictures(4)
    return [
        batch_of(images, labels, index=i, **({"ends_epoch": i == num - 1} | places))
        for i in range(num)
    ]


def test_micro_batches_are_taken_one_at_a_time_and_no_further_than_the_step() -> None:
    state, taken, seen = state_of(RUN), [], []

    def noted() -> Iterator[Batch]:
        for batch in parts_of_steps(2):
            taken.append(batch)
            yield batch

    state.model.register_forward_hook(lambda *_: seen.append(len(taken)))
    state.optimizer.register_step_pre_hook(lambda *_: seen.append(-len(taken)))
    run_loop(state, noted())
    assert seen == [1, 2, 3, -3, 4, 5, 6, -6]


def test_a_step_of_too_few_micro_batches_is_not_taken() -> None:
    state = state_of(RUN)
    before = plain(state.model)
    with pytest.raises(ValueError, match="the micro-batches of step 0 up to its last"):
        run_loop(state, parts_of_steps(1)[:2])
    assert state.position.step == 0
    assert all(torch.equal(value, before[k]) for k, value in plain(state.model).items())


def test_the_audit_log_has_what_was_trained_on_and_not_what_failed(
    tmp_path: Path,
) -> None:
    state, num_seen = state_of(RUN), [0]

    def fail(module: nn.Module, args: Any) -> None:
        num_seen[0] += 1
        if num_seen[0] == 6:
            raise RuntimeError("as the test wants it")

    state.model.register_forward_pre_hook(fail)
    log = AuditLog(tmp_path, attempt=1, step=0, rank=0)
    settings = settings_of(RUN, steps_per_epoch=10)
    with (
        small_loop(state, parts_of_steps(2), settings=settings, audit_log=log) as loop,
        pytest.raises(RuntimeError, match="as the test wants it"),
    ):
        loop.train()
    log.close()
    assert [(item.step, item.row) for item in trained(tmp_path)] == sorted(
        (step, row) for step in (0, 0, 0, 1, 1) for row in range(4)
    )


def test_a_run_that_is_to_end_writes_a_checkpoint_when_it_next_logs() -> None:
    settings = settings_of(RUN, steps_per_epoch=10)  # logs every 2 steps
    items = some_batches(5)
    state = state_of(RUN)
    with small_loop(state, items, settings=settings, is_stopping=True) as loop:
        loop.train()
    assert loop.kept("step") == [Position(epoch=0, batch=2, step=2)]
    assert state.position.step == 2
    state = state_of(RUN)
    with small_loop(state, items, settings=settings, is_preempted=True) as loop:
        loop.train()
    assert [position.step for position in loop.kept("step")] == [2, 4]
    assert loop.kept("epoch") == [Position(epoch=1, batch=0, step=5)]


def test_checkpoints_come_by_steps_and_not_twice_at_an_epochs_end() -> None:
    run = dataclasses.replace(RUN, checkpoint_every_steps=3)
    items = [*some_batches(6), *some_batches(5)]
    loop = looped(state_of(run), items, run=run)
    assert loop.kept("step") == [
        Position(epoch=0, batch=3, step=3),
        Position(epoch=1, batch=3, step=9),
    ]
    assert loop.kept("epoch") == [
        Position(epoch=1, step=6),
        Position(epoch=2, step=11),
    ]


def test_checkpoints_come_by_time_when_metrics_are_logged(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = dataclasses.replace(RUN, checkpoint_every_minutes=1.0)  # logs every 2 steps
    clock = {"now": 0.0}
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock["now"])

    def slowly(items: list[Batch]) -> Iterator[Batch]:
        for item in items:
            clock["now"] += 25.0
            yield item

    items = slowly(some_batches(12, ends_epoch=False))
    loop = looped(state_of(run), items, run=run)
    # 100 s after the start and after every one: the first log past 60 s.
    assert [position.step for position in loop.kept("step")] == [4, 8, 12]
    never = dataclasses.replace(run, checkpoint_every_minutes=0.0)
    items = slowly(some_batches(6, ends_epoch=False))
    assert looped(state_of(never), items, run=never).saved == []


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

    keep = NotingCheckpointer.keep

    def keep_slowly(self: NotingCheckpointer, *args: Any, **kwargs: Any) -> None:
        pass_time(100)
        keep(self, *args, **kwargs)

    monkeypatch.setattr(NotingCheckpointer, "keep", keep_slowly)
    loop = looped(state_of(run), slowly(some_batches(4)), run=run)
    assert [position.step for position in loop.kept("step")] == [3]
    logs = loop.logs
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
    with pytest.raises(BadImagesError, match=r"at most 3\.00% of 100 .* got 4"):
        run_loop(state_of(run), items(1, 1, 1, 1, 0), run=run)
