"""What workers tell reaches the driver, once and in order; its word reaches them."""

from __future__ import annotations

import threading

import pytest

from pipelines.driver.progress import Display
from pipelines.events.bad_images import BadImageLog
from pipelines.events.channel import (
    Channel,
    Event,
    Metrics,
    WorkerFailed,
    WorkerStarted,
    consumed,
)
from tests.waiting import wait_for


def begun(rank: int, *, host: str, world_size: int = 3, step: int = 0) -> WorkerStarted:
    return WorkerStarted(rank=rank, world_size=world_size, host=host, step=step)


def test_all_that_was_posted_is_heard_in_order_the_last_after_the_end() -> None:
    channel, found = Channel(), list[Event]()
    items = [Metrics(step=step, metrics={"loss": 1.0}) for step in range(5)]
    for item in items[:4]:
        channel.post(item)
    with consumed(
        channel, handle=found.append, is_over=threading.Event(), every_s=0.02
    ):
        wait_for(channel.is_handled, what="the driver", seconds=10)
        assert found == items[:4]
        channel.post(items[4])
        assert not channel.is_handled()
    assert found == items
    assert not channel.should_stop()


def test_what_was_taken_is_heard_when_the_driver_comes_again() -> None:
    channel = Channel()
    assert channel.is_handled()
    channel.post(begun(0, host="a"))
    assert not channel.is_handled()
    assert len(channel.take()) == 1
    assert not channel.is_handled()
    assert channel.take() == []
    assert channel.is_handled()


def test_the_driver_s_word_to_end_reaches_the_board() -> None:
    channel, is_over = Channel(), threading.Event()
    with consumed(channel, handle=lambda item: None, is_over=is_over, every_s=0.02):
        is_over.set()
        wait_for(channel.should_stop, what="the driver's word", seconds=10)


def test_hosts_are_named_when_all_workers_have_begun(
    capsys: pytest.CaptureFixture[str],
) -> None:
    bad_images = BadImageLog(keep=lambda text: None)
    display = Display(num_steps=10, num_epochs=1, bad_images=bad_images)
    display.show(begun(1, host="b"))
    display.show(begun(0, host="a"))
    assert capsys.readouterr().out == ""
    display.show(begun(2, host="a"))
    assert capsys.readouterr().out == "3 workers on a: 2, b: 1; from step 0\n"

    display.show(WorkerFailed(rank=1, reason="it died"))
    assert capsys.readouterr().out == "worker 1 failed: it died\n"
    # One that began and died before the others did is forgotten.
    display.show(begun(0, host="a", step=7))
    display.show(begun(0, host="b", world_size=1, step=7))
    assert capsys.readouterr().out == "1 worker on b: 1; from step 7\n"
    display.close()
