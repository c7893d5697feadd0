"""Protocol for a worker's process group: rank, broadcast, report, post."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, TypeVar

import torch

from pipelines.config import Data
from pipelines.data.loader import ShardOpener
from pipelines.data.reading import Reading
from pipelines.events.channel import Event
from pipelines.storage.path import StoragePath

Small = TypeVar("Small", int, float, str)


class Group(Protocol):
    """A worker's connection to the driver and to the other workers, if any.

    All workers call the collectives together, in the same order: opening datasets,
    `broadcast`, `report` and `is_preempted`.
    """

    rank: int
    world_size: int
    device: torch.device
    folder: StoragePath
    """Folder of the run, which holds its checkpoints."""
    is_watched: bool
    """Whether a worker that exits is restarted."""

    def opener(self, reading: Reading, *, data: Data) -> ShardOpener:
        """Return an opener of a split's datasets on all workers."""
        ...

    def broadcast(self, value: Small) -> Small:
        """Broadcast rank 0's value to all workers."""
        ...

    def report(self, metrics: Mapping[str, float]) -> None:
        """Report metrics to the controller of the run, such as a sweep."""
        ...

    def post(self, item: Event) -> None:
        """Post an event to the driver, without waiting for it."""
        ...

    def should_stop(self) -> bool:
        """Check for a stop request of the driver; at least one worker sees it."""
        ...

    def is_preempted(self) -> bool:
        """Check whether any worker's machine is about to be preempted."""
        ...

    def close(self) -> None:
        """Shut down the openers' threads, without waiting for them."""
        ...
