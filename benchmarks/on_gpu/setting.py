"""Device, sizes and folders that all stages share, and their clock."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from benchmarks.timing import Spread, spread
from pipelines.hardware.device import synchronize

T = TypeVar("T")
Figures = Mapping[str, Any]
Tasks = Mapping[str, Callable[[], Figures]]
"""The cases of a stage by name, each measured when its turn comes."""
_MAX_CALLS = 10_000


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Device, sizes and folders of one run of the script."""

    device: torch.device
    tiny: bool
    """Use minimal sizes and durations, to try the script itself."""
    work: Path
    """For what later stages read: images, shards, compiled kernels."""
    out: Path
    """For what a person wants."""

    def pick(self, full: T, *, tiny: T) -> T:
        """Return `tiny` in a tiny run, else `full`."""
        return tiny if self.tiny else full

    @property
    def num_threads(self) -> int:
        """Threads for decoding, and for a CPU's steps."""
        return self.pick(len(os.sched_getaffinity(0)), tiny=1)

    @property
    def num_rounds(self) -> int:
        """Number of rounds, whose median counts."""
        return self.pick(3, tiny=1)


def times_ms(
    function: Callable[[], object], *, setting: Setting, round_s: float = 0.7
) -> Spread:
    """Measure the milliseconds of a call in rounds of many, after two calls' warm-up.

    The device is synchronised at a round's end alone, as a training does not wait
    either. The number of calls is fixed before: a host runs so far ahead of its device
    that the clock would end a round long before the device has.
    """

    def seconds(num_calls: int) -> float:
        synchronize(setting.device)
        start_s = time.perf_counter()
        for _ in range(num_calls):
            function()
        synchronize(setting.device)
        return time.perf_counter() - start_s

    function()
    wanted_s = setting.pick(round_s, tiny=0.0)
    num_calls = min(max(math.ceil(wanted_s / seconds(1)), 1), _MAX_CALLS)
    spent_s = [seconds(num_calls) for _ in range(setting.num_rounds)]
    return spread([1000 * of / num_calls for of in spent_s])
