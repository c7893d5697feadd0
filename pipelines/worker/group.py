"""Say what a worker needs of the group that it trains in: see `Group`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, TypeVar

import torch

from pipelines.config import Data
from pipelines.data.reading import Reading
from pipelines.data.stream import ShardOpener
from pipelines.events.channel import Event
from pipelines.storage.path import StoragePath

Small = TypeVar("Small", int, str)


class Group(Protocol):
    """Connect a worker to the others and to the driver, of which there may be none.

    What all workers call together, and in the same order, is a collective: opening
    datasets, `broadcast`, `report` and `is_preempted`.
    """

    rank: int
    world_size: int
    device: torch.device
    folder: StoragePath
    """The run's, where its checkpoints lie."""
    is_watched: bool
    """Whether a worker that ends itself is started again."""

    def opener(self, reading: Reading, *, data: Data) -> ShardOpener:
        """Give what opens a split's datasets on all workers together."""
        ...

    def broadcast(self, value: Small) -> Small:
        """Give all workers the first one's value."""
        ...

    def report(self, metrics: Mapping[str, float]) -> None:
        """Tell those who decide on runs, such as a sweep, what was measured."""
        ...

    def post(self, item: Event) -> None:
        """Tell the driver something, without waiting for it."""
        ...

    def should_stop(self) -> bool:
        """Tell one worker at least whether the driver wants all of them to end."""
        ...

    def is_preempted(self) -> bool:
        """Tell all workers whether a machine of theirs is about to be taken."""
        ...

    def close(self) -> None:
        """End what the openers have started, without waiting for it."""
        ...
