"""Say what a worker needs of the group that it trains in: see `Group`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, TypeVar

import torch

from pipelines.config import Data
from pipelines.data.reading import Reading
from pipelines.data.stream import Opener
from pipelines.events.channel import Item
from pipelines.storage.path import Place

Small = TypeVar("Small", int, str)


class Group(Protocol):
    """Connect a worker to the others and to the driver, of which there may be none.

    What all workers call together, and in the same order, is a collective: opening
    datasets, `agreed`, `report` and `is_leaving`.
    """

    rank: int
    world_size: int
    device: torch.device
    folder: Place
    """The run's, where its checkpoints lie."""
    is_watched: bool
    """Whether a worker that ends itself is started again."""

    def opener(self, reading: Reading, *, data: Data) -> Opener:
        """Give what opens a split's datasets on all workers together."""
        ...

    def agreed(self, value: Small) -> Small:
        """Give all workers the first one's value."""
        ...

    def report(self, metrics: Mapping[str, float]) -> None:
        """Tell those who decide on runs, such as a sweep, what was measured."""
        ...

    def post(self, item: Item) -> None:
        """Tell the driver something, without waiting for it."""
        ...

    def is_ending(self) -> bool:
        """Tell one worker at least whether the driver wants all of them to end."""
        ...

    def is_leaving(self) -> bool:
        """Tell all workers whether a machine of theirs is about to be taken."""
        ...

    def close(self) -> None:
        """End what the openers have started, without waiting for it."""
        ...
