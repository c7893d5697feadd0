"""What every stage is told: device, sizes, folders; and what a stage consists of."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

T = TypeVar("T")
Figures = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Task:
    """One case of a stage, measured when its turn comes."""

    name: str
    measure: Callable[[], Figures]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Device, sizes and folders of one run of the script."""

    device: Literal["auto", "cpu", "cuda"]
    tiny: bool
    """Every size and duration as small as it can be, to try the script itself."""
    work: Path
    """For what later stages read: images, shards, compiled kernels, runs."""
    out: Path
    """For what a person wants."""

    def pick(self, full: T, *, tiny: T) -> T:
        """Choose a size."""
        return tiny if self.tiny else full

    @property
    def patience(self) -> float:
        """Times its limit that a stage may take: machines that try it may be busy."""
        return self.pick(1.0, tiny=5.0)

    @property
    def num_threads(self) -> int:
        """Threads for decoding, and for a CPU's steps."""
        return self.pick(len(os.sched_getaffinity(0)), tiny=1)

    @property
    def round_s(self) -> float:
        """Seconds that one measured round lasts; at least one call is made."""
        return self.pick(0.7, tiny=0.0)

    @property
    def num_rounds(self) -> int:
        """Rounds whose median counts."""
        return self.pick(3, tiny=1)
