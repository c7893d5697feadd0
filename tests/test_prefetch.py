"""The decode thread: order, errors and the end, and no thread left behind."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from pipelines.data import prefetch
from pipelines.data.batch import Batch
from pipelines.data.prefetch import Prefetcher, taken_ahead

CPU = torch.device("cpu")


def batch(index: int) -> Batch:
    return Batch(
        images=torch.full((2, 3, 1, 1), float(index)),
        labels=torch.zeros(2, dtype=torch.int64),
        weights=torch.ones(2),
        draw_ids=np.arange(2),
        epoch=0,
        index=index,
        micro=0,
        global_rows=2,
        ends_step=True,
        ends_epoch=False,
    )


def decode_threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "decode" and t.is_alive()]


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    before = decode_threads()
    yield
    assert decode_threads() == before


def test_batches_come_in_order_and_the_end_stays_the_end() -> None:
    items = Prefetcher((batch(i) for i in range(9)), num_items=2, device=CPU)
    assert [item.index for item in items] == list(range(9))
    assert list(items) == []
    items.close()


def test_batches_are_made_ahead_within_the_bound() -> None:
    made = threading.Semaphore(0)
    num_made = 0

    def source() -> Iterator[Batch]:
        nonlocal num_made
        for index in range(20):
            num_made += 1
            made.release()
            yield batch(index)

    items = Prefetcher(source(), num_items=3, device=CPU)
    for _ in range(4):  # three that wait, and one that wants to
        assert made.acquire(timeout=10)
    assert not made.acquire(timeout=0.3)
    assert num_made == 4
    assert next(iter(items)).index == 0
    assert made.acquire(timeout=10)
    items.close()


def test_an_error_comes_after_the_batches_before_it_and_again() -> None:
    def source() -> Iterator[Batch]:
        yield batch(0)
        raise ValueError("shard x is damaged")

    items = Prefetcher(source(), num_items=4, device=CPU)
    iterator = iter(items)
    assert next(iterator).index == 0
    with pytest.raises(ValueError, match="shard x"):
        next(iterator)
    with pytest.raises(ValueError, match="shard x"):
        next(iter(items))
    items.close()


def test_close_ends_the_thread_while_its_queue_is_full() -> None:
    def endless() -> Iterator[Batch]:
        index = 0
        while True:
            yield batch(index)
            index += 1

    items = Prefetcher(endless(), num_items=1, device=CPU)
    assert next(iter(items)).index == 0
    items.close()
    assert list(items) == []
    items.close()


def test_close_wakes_who_waits() -> None:
    go = threading.Event()

    def stuck() -> Iterator[Batch]:
        go.wait(10)
        yield from ()

    items = Prefetcher(stuck(), num_items=1, device=CPU)
    got: list[Batch] = []
    taker = threading.Thread(target=lambda: got.extend(items))
    taker.start()
    closer = threading.Thread(target=items.close)
    closer.start()
    go.set()
    for thread in (taker, closer):
        thread.join(10)
        assert not thread.is_alive()
    assert got == []


def test_the_models_stream_waits_for_each_batchs_own_event(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What a GPU is told, in order; no host waits, which the thread would stand in."""
    told: list[Any] = []
    events = itertools.count()

    @contextlib.contextmanager
    def side_stream(device: torch.device) -> Iterator[None]:
        told.append("decode thread")
        yield
        told.append("left")

    def record_event(device: torch.device) -> str:
        assert threading.current_thread().name == "decode"
        return f"event {next(events)}"

    def used_here(*tensors: torch.Tensor) -> None:
        assert threading.current_thread().name != "decode"
        told.append([tuple(tensor.shape) for tensor in tensors])

    monkeypatch.setattr(prefetch, "side_stream", side_stream)
    monkeypatch.setattr(prefetch, "record_event", record_event)
    monkeypatch.setattr(
        prefetch, "wait_for_event", lambda event, device: told.append(event)
    )
    monkeypatch.setattr(prefetch, "used_here", used_here)
    items = Prefetcher((batch(i) for i in range(3)), num_items=3, device=CPU)
    for index, item in enumerate(items):
        assert item.index == index
        assert told.pop() == [(2, 3, 1, 1), (2,), (2,)]  # after the wait
        assert told.pop() == f"event {index}"
    assert told == ["decode thread", "left"]
    items.close()


@pytest.mark.parametrize("num_ahead", [0, 1, 3])
def test_taken_ahead_keeps_the_order_and_an_errors_place(num_ahead: int) -> None:
    taken: list[int] = []

    def source(num: int, *, fails: bool) -> Iterator[int]:
        for index in range(num):
            taken.append(index)
            yield index
        if fails:
            raise ValueError("shard x is damaged")

    for num in range(6):
        taken.clear()
        seen = []
        for item in taken_ahead(source(num, fails=False), num_ahead=num_ahead):
            assert len(taken) == min(item + 1 + num_ahead, num)
            seen.append(item)
        assert seen == list(range(num))
        failing = taken_ahead(source(num, fails=True), num_ahead=num_ahead)
        assert list(itertools.islice(failing, num)) == list(range(num))
        with pytest.raises(ValueError, match="shard x"):
            next(failing)
