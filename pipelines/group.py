"""Say what a worker needs of the group that it trains in: see `Group`."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

import torch

from pipelines.config import Data
from pipelines.ingest.reading import Reading
from pipelines.ingest.stream import Opener
from pipelines.telling.board import Item


class Group(Protocol):
    """Connect a worker to the others and to the driver, of which there may be none.

    What all workers call together, and in the same order, is a collective: opening
    datasets, `agreed` and `report`.
    """

    rank: int
    world_size: int
    device: torch.device

    def opener(self, reading: Reading, *, data: Data) -> Opener:
        """Give what opens a split's datasets on all workers together."""
        ...

    def latest(self) -> AbstractContextManager[Path | None]:
        """Give the folder of the checkpoint to go on from, None where there is none."""
        ...

    def agreed(self, value: int) -> int:
        """Give all workers the first one's value."""
        ...

    def report(
        self, metrics: Mapping[str, float], *, folder: Path | None, name: str
    ) -> None:
        """Keep the first worker's checkpoint under a name, and what was measured.

        Args:
            folder: The checkpoint, on the first worker; others give None.
        """
        ...

    def post(self, item: Item) -> None:
        """Tell the driver something, without waiting for it."""
        ...

    def is_ending(self) -> bool:
        """Tell one worker at least whether the driver wants all of them to end."""
        ...

    def close(self) -> None:
        """End what the openers have started, without waiting for it."""
        ...
