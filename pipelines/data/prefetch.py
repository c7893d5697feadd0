"""Decode ahead of the model on a thread, within a bound.

On a GPU three things go on at once: the model's step, the decoding of a batch, and the
reading and feeding of the next one. Nobody waits on the host for the device: the
model's stream waits for the event that a batch comes with.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch

from pipelines.data.batch import Batch
from pipelines.hardware.device import (
    Event,
    record_event,
    side_stream,
    used_here,
    wait_for_event,
)

_CLOSE_TIMEOUT_S = 5.0

T = TypeVar("T")


def taken_ahead(items: Iterable[T], *, num_ahead: int) -> Iterator[T]:
    """Yield items in order, each only after the `num_ahead` behind it were taken.

    An error comes after the items before it, as it would without.
    """
    waiting: deque[T] = deque()
    try:
        for item in items:
            waiting.append(item)
            if len(waiting) > num_ahead:
                yield waiting.popleft()
    except Exception:
        yield from waiting
        raise
    yield from waiting


# A batch and the event that marks it ready, an error, or the end.
_Item = tuple[Batch, Event | None] | BaseException | None


class Prefetcher:
    """Thread that runs an iterator and passes its items through a bounded queue.

    An error of the iterator is raised where the items are taken. `close` ends the
    thread; it is safe at any moment, and taking items after it ends at once.
    """

    def __init__(
        self, items: Iterable[Batch], *, num_items: int, device: torch.device
    ) -> None:
        self._device = device
        self._queue: queue.Queue[_Item] = queue.Queue(num_items)
        self._closed = threading.Event()
        self._thread = threading.Thread(
            target=self._fill, args=(items,), name="decode", daemon=True
        )
        self._thread.start()

    def __iter__(self) -> Iterator[Batch]:
        while not self._closed.is_set():
            item = self._queue.get()
            if item is None or isinstance(item, BaseException):
                # The end stays in the queue: a later call must not wait for ever.
                self._queue.put(item)
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            batch, made = item
            wait_for_event(made, self._device)
            used_here(batch.images, batch.labels, batch.weights)
            yield batch

    def close(self) -> None:
        """Stop the thread, and wait briefly for it."""
        self._closed.set()
        self._thread.join(timeout=_CLOSE_TIMEOUT_S)
        with contextlib.suppress(queue.Full):
            self._queue.put_nowait(None)  # wakes whoever waits for an item

    def _fill(self, items: Iterable[Batch]) -> None:
        last: BaseException | None = None
        try:
            # On the default stream decoding would wait for the model.
            with side_stream(self._device):
                for batch in items:
                    if not self._put((batch, record_event(self._device))):
                        return
        except BaseException as error:
            last = error
        self._put(last)

    def _put(self, item: _Item) -> bool:
        while not self._closed.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False
