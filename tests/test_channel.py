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
    Tick,
    WorkerFailed,
    WorkerStarted,
    consumed,
)
from tests.waiting import wait_for


def begun(rank: int, *, host: str, world_size: int = 3, step: int = 0) -> WorkerStarted:
    return WorkerStarted(rank=rank, world_size=world_size, host=host, step=step)


class Collector:
    """A sink that keeps what it gets, ticks apart."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.num_ticks = 0

    def handle(self, event: Event) -> None:
        if isinstance(event, Tick):
            self.num_ticks += 1
        else:
            self.events.append(event)


def test_all_that_was_posted_is_heard_in_order_the_last_after_the_end() -> None:
    channel, sinks = Channel(), [Collector(), Collector()]
    items = [Metrics(step=step, metrics={"loss": 1.0}) for step in range(5)]
    for item in items[:4]:
        channel.post(item)
    with consumed(channel, sinks, should_stop=threading.Event(), every_s=0.02):
        wait_for(channel.is_handled, what="the driver")
        assert [sink.events for sink in sinks] == 2 * [items[:4]]
        channel.post(items[4])
        assert not channel.is_handled()
    assert [sink.events for sink in sinks] == 2 * [items]
    assert not channel.should_stop()


def test_each_look_is_a_tick_and_nothing_is_begun_after_the_end() -> None:
    channel, sink = Channel(), Collector()
    with consumed(channel, [sink], should_stop=threading.Event(), every_s=0.02):
        wait_for(lambda: sink.num_ticks > 2, what="ticks")
    num_ticks = sink.num_ticks
    assert sink.events == []
    with consumed(channel, [sink], should_stop=threading.Event(), every_s=60):
        channel.post(begun(0, host="a"))
    assert len(sink.events) == 1
    assert sink.num_ticks == num_ticks


def test_what_was_taken_is_heard_when_the_driver_comes_again() -> None:
    channel = Channel()
    assert channel.is_handled()
    channel.post(begun(0, host="a"))
    assert not channel.is_handled()
    assert len(channel.take()) == 1
    assert not channel.is_handled()
    assert channel.take() == []
    assert channel.is_handled()


def test_the_driver_s_word_to_end_reaches_the_workers() -> None:
    channel, should_stop = Channel(), threading.Event()
    with consumed(channel, [], should_stop=should_stop, every_s=0.02):
        should_stop.set()
        wait_for(channel.should_stop, what="the driver's word")


def test_hosts_are_named_when_all_workers_have_begun(
    capsys: pytest.CaptureFixture[str],
) -> None:
    bad_images = BadImageLog(keep=lambda text: None)
    display = Display(num_steps=10, num_epochs=1, bad_images=bad_images)
    display.handle(begun(1, host="b"))
    display.handle(begun(0, host="a"))
    assert capsys.readouterr().out == ""
    display.handle(begun(2, host="a"))
    assert capsys.readouterr().out == "3 workers on a: 2, b: 1; from step 0\n"

    display.handle(WorkerFailed(rank=1, reason="it died"))
    assert capsys.readouterr().out == "worker 1 failed: it died\n"
    # One that began and died before the others did is forgotten.
    display.handle(begun(0, host="a", step=7))
    display.handle(begun(0, host="b", world_size=1, step=7))
    assert capsys.readouterr().out == "1 worker on b: 1; from step 7\n"
    display.close()
