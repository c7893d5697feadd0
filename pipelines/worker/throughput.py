"""Time a training loop: images per second, waiting, and when a checkpoint is due."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator

from pipelines.data.batch import Batch


class Throughput:
    """Meter of images per second and of the share of time spent waiting for them."""

    def __init__(self) -> None:
        self.restart(kept=True)

    def restart(self, *, kept: bool = False) -> None:
        """Restart the measurement; `kept` if a checkpoint was just written."""
        self._start_s = time.perf_counter()
        self._waited_s = 0.0
        if kept:
            self._kept_s = self._start_s

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Exclude the time in which a checkpoint is written."""
        paused_s = time.perf_counter()
        yield
        self._kept_s = time.perf_counter()
        self._start_s += self._kept_s - paused_s

    def is_time(self, minutes: float) -> bool:
        """Check whether the last checkpoint is `minutes` old; 0 is never."""
        return 0 < minutes * 60 <= time.perf_counter() - self._kept_s

    def waiting(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yield the batches, and measure the time waited for each."""
        iterator = iter(batches)
        while True:
            start_s = time.perf_counter()
            batch = next(iterator, None)
            self._waited_s += time.perf_counter() - start_s
            if batch is None:
                return
            yield batch

    def rates(self, num_images: float) -> dict[str, float]:
        """Return images per second and the share of waiting, and restart."""
        seconds = time.perf_counter() - self._start_s
        rates = {
            "images_per_s": num_images / seconds,
            "waiting_share": self._waited_s / seconds,
        }
        self.restart()
        return rates
