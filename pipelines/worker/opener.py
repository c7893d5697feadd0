"""Open datasets on all workers of a group together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pyarrow as pa
import ray
from ray.train.collective import broadcast_from_rank_zero

from pipelines.config import Data
from pipelines.data.epoch_plan import Unit
from pipelines.data.reading import Reading
from pipelines.worker.ray_source import shares, split_units


class RayOpener:
    """Opener of Ray datasets: rank 0 builds each, and all workers get its iterators.

    Building one takes seconds of planning and of actor start-up, so a thread does it
    while the workers train; opening it takes milliseconds.
    """

    def __init__(self, reading: Reading, *, data: Data, rank: int) -> None:
        self._reading = reading
        self._data = data
        self._rank = rank
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="split")
        self._prepared: Future[ray.ObjectRef] | None = None

    def prepare(self, plan: Callable[[], list[Unit]]) -> None:
        """Start planning units and building a dataset of them, on rank 0."""
        self._prepared = self._thread.submit(self._split, plan)

    def open(self) -> Iterator[pa.Table]:
        """Return this worker's tables of the prepared dataset: a collective."""
        # References travel, in a list so that Ray does not follow them.
        made = None if self._prepared is None else [self._prepared.result()]
        handed = broadcast_from_rank_zero(made)
        assert handed is not None
        return shares(ray.get(handed[0])[self._rank], data=self._data)

    def close(self) -> None:
        """Shut down the thread without waiting for it."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _split(self, plan: Callable[[], list[Unit]]) -> ray.ObjectRef:
        return ray.put(split_units(plan(), reading=self._reading, data=self._data))
