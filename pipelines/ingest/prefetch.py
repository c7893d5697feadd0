"""Decode ahead of the model on a thread, within a bound."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Iterable, Iterator

import torch

from pipelines.device import side_stream, used_here, wait_for_stream
from pipelines.ingest.batch import Batch

_CLOSE_TIMEOUT_S = 5.0


class Prefetcher:
    """Run an iterator on a thread and hand its items over through a bounded queue.

    An error of the iterator is raised where the items are taken. `close` ends the
    thread; it is safe at any moment, and taking items after it ends at once.
    """

    def __init__(
        self, items: Iterable[Batch], *, num_items: int, device: torch.device
    ) -> None:
        self._device = device
        self._queue: queue.Queue[Batch | BaseException | None] = queue.Queue(num_items)
        self._closed = threading.Event()
        self._thread = threading.Thread(
            target=self._fill, args=(items,), name="decode", daemon=True
        )
        self._thread.start()

    def __iter__(self) -> Iterator[Batch]:
        while not self._closed.is_set():
            item = self._queue.get()
            if item is None or isinstance(item, BaseException):
                # The end stays: who asks again must not wait for ever.
                self._queue.put(item)
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            used_here(item.images, item.labels, item.weights)
            yield item

    def close(self) -> None:
        """Stop the thread, and wait a moment for it."""
        self._closed.set()
        self._thread.join(timeout=_CLOSE_TIMEOUT_S)
        with contextlib.suppress(queue.Full):
            self._queue.put_nowait(None)  # wakes whoever waits for an item

    def _fill(self, items: Iterable[Batch]) -> None:
        last: BaseException | None = None
        try:
            # On the default stream decoding would wait for the model.
            with side_stream(self._device):
                for item in items:
                    wait_for_stream(self._device)
                    if not self._put(item):
                        return
        except BaseException as error:
            last = error
        self._put(last)

    def _put(self, item: Batch | BaseException | None) -> bool:
        while not self._closed.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False
