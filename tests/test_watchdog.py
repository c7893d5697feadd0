"""A worker that hangs ends itself, and one that is only slow or paused does not."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipelines.worker import watchdog
from pipelines.worker.watchdog import EXIT_CODE, Watchdog

# The watchdog passes on whatever it is given.
BATCHES: Any = "abc"


def hangs_in_the_third_batch() -> Iterator[Any]:
    yield from BATCHES[:2]
    threading.Event().wait()


def train_until_it_hangs(folder: Path) -> None:
    """Be a worker whose images stop coming; what it says goes into files."""
    error = os.open(folder / "stderr", os.O_WRONLY | os.O_CREAT)
    os.dup2(error, 2)

    def tell(line: str) -> None:
        (folder / "told").write_text(line)

    with Watchdog(0.2, tell=tell) as dog:
        for _ in dog.watching(hangs_in_the_third_batch(), doing="training"):
            pass


def test_a_process_that_hangs_is_ended_and_shows_where(tmp_path: Path) -> None:
    processes = multiprocessing.get_context("forkserver")
    # torch takes seconds to import: one process does, and others fork off it.
    processes.set_forkserver_preload(["tests.small_runs"])
    worker = processes.Process(target=train_until_it_hangs, args=(tmp_path,))
    worker.start()
    worker.join()
    assert worker.exitcode == EXIT_CODE
    told = (tmp_path / "told").read_text()
    assert told == "no step for 0.2 s (waiting for images); ended"
    stacks = (tmp_path / "stderr").read_text()
    assert "in hangs_in_the_third_batch" in stacks
    assert "in train_until_it_hangs" in stacks


class Clock:
    """Be the time that the watchdog knows."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def passing(self, seconds: Iterable[float]) -> Iterator[Any]:
        """Give a batch after each of these times."""
        for wait_s, batch in zip(seconds, itertools.cycle(BATCHES), strict=False):
            self.now_s += wait_s
            yield batch


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: clock.now_s)
    return clock


def unwatched(timeout_s: float) -> Watchdog:
    """Make a watchdog that only looks when it is asked to."""
    return Watchdog(timeout_s, tell=pytest.fail, end=lambda code: pytest.fail("ended"))


def test_only_the_first_step_may_take_two_minutes(clock: Clock) -> None:
    dog = unwatched(10)
    lines = []

    def slowly(*waits_s: float) -> Iterator[Any]:
        for batch in clock.passing(waits_s):
            lines.append(dog.overdue())
            yield batch

    steps_s = iter([119.0, 9.0, 11.0])
    for _ in dog.watching(slowly(119.0, 9.0, 11.0), doing="training"):
        clock.now_s += next(steps_s)
        lines.append(dog.overdue())
    assert lines == [
        *("", "", "", ""),
        "no step for 10 s (waiting for images); ended",
        "no step for 10 s (training); ended",
    ]
    # An evaluation begins with a first batch of its own.
    list(dog.watching(slowly(121.0), doing="evaluating"))
    assert lines[-1] == "no step for 120 s (waiting for images); ended"
    assert dog.overdue() == ""


def test_what_is_paused_may_take_as_long_as_it_takes(clock: Clock) -> None:
    dog = unwatched(10)
    for number, _ in enumerate(dog.watching(BATCHES, doing="training")):
        with dog.paused():
            clock.now_s += 1e6
            assert dog.overdue() == ""
        # From the end of the pause it counts again.
        assert dog.overdue() == ""
        clock.now_s += 10 if number else 120
        assert dog.overdue() != ""
    assert dog.overdue() == ""


def test_between_loops_nothing_is_watched(clock: Clock) -> None:
    dog = unwatched(10)
    assert dog.overdue() == ""
    for _ in dog.watching(BATCHES, doing="training"):
        # Evaluation breaks off where its epoch ends.
        for _ in dog.watching(BATCHES, doing="evaluating"):
            break
        clock.now_s += 1e6
        assert dog.overdue() == ""
    clock.now_s += 1e6
    assert dog.overdue() == ""


def watchers() -> list[threading.Thread]:
    return [item for item in threading.enumerate() if item.name == "watchdog"]


def test_a_closed_one_ends_its_thread_and_one_of_no_time_has_none() -> None:
    before = watchers()
    with unwatched(0):
        assert watchers() == before
    with unwatched(0.1):
        (thread,) = set(watchers()) - set(before)
    thread.join(60)
    assert not thread.is_alive()
