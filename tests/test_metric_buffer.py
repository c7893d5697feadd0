"""Points reach a store in order, wait while it is away, and never stop the caller."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence

import pytest

from pipelines.tracking.buffer import (
    MAX_POINTS_PER_SEND,
    MetricBuffer,
    Point,
    RefusedError,
)


def _points(steps: Sequence[int]) -> list[Point]:
    return [Point("loss", float(step), step, 0) for step in steps]


def test_points_arrive_once_and_in_order_across_an_outage(
    caplog: pytest.LogCaptureFixture,
) -> None:
    arrived: list[int] = []
    outage = iter([False, True, True])

    def send(points: Sequence[Point]) -> None:
        if next(outage, False):
            raise ConnectionError("away from https://me:word@host")
        arrived.extend(point.step for point in points)

    buffer = MetricBuffer(send, place="store")
    num_points = 2 * MAX_POINTS_PER_SEND + 7
    for step in range(num_points):
        buffer.add(_points([step]))
    assert buffer.close(60) == 0
    assert arrived == list(range(num_points))
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2, "one when it goes, one when it is back"
    assert "ConnectionError" in messages[0]
    assert "word" not in messages[0]
    assert "again" in messages[1]


def test_a_store_that_hangs_stops_neither_add_nor_close() -> None:
    is_sending, may_end = threading.Event(), threading.Event()

    def send(points: Sequence[Point]) -> None:
        is_sending.set()
        may_end.wait()

    buffer = MetricBuffer(send, place="store")
    buffer.add(_points([0]))
    assert is_sending.wait(60)
    buffer.add(_points([1, 2]))
    assert buffer.close(0.1) == 3, "the one on its way counts as not written"
    may_end.set()


def test_the_oldest_points_are_lost_past_the_bound() -> None:
    is_back, failed = threading.Event(), threading.Event()
    arrived: list[int] = []

    def send(points: Sequence[Point]) -> None:
        if not is_back.is_set():
            failed.set()
            raise ConnectionError
        arrived.extend(point.step for point in points)

    buffer = MetricBuffer(send, place="store", max_points=5)
    buffer.add(_points([0]))
    assert failed.wait(60)
    buffer.add(_points(range(1, 10)))
    is_back.set()
    assert buffer.close(60) == 5
    assert arrived == [5, 6, 7, 8, 9]


def test_refused_points_are_lost_and_later_ones_are_not(
    caplog: pytest.LogCaptureFixture,
) -> None:
    refused, arrived = threading.Event(), []

    def send(points: Sequence[Point]) -> None:
        if points[0].step == 0:
            refused.set()
            raise RefusedError("bad name")
        arrived.extend(point.step for point in points)

    buffer = MetricBuffer(send, place="store")
    with caplog.at_level(logging.WARNING):
        buffer.add(_points([0]))
        assert refused.wait(60)
        buffer.add(_points([1]))
        assert buffer.close(60) == 1
    assert arrived == [1]
    assert "refused 1 points: RefusedError: bad name" in caplog.text


def test_an_empty_buffer_closes() -> None:
    assert MetricBuffer(lambda points: None, place="store").close(60) == 0
