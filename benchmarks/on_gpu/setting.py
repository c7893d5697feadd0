"""Device, sizes and images that all stages share, and their clock."""

from __future__ import annotations

import functools
import io
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from torch.utils.benchmark import Timer

from benchmarks.photographs import cut_photographs
from benchmarks.rounds import Record
from pipelines.hardware.device import synchronize
from pipelines.transforms.rows import Rows

T = TypeVar("T")
Tasks = Mapping[str, Callable[[], Record]]
"""The cases of a stage by name, each measured when its turn comes."""
_MAX_CALLS = 10_000


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Device, sizes and folder of one run of the script."""

    device: torch.device
    tiny: bool
    """Use minimal sizes and durations, to try the script itself."""
    work: Path
    """For what later stages read."""

    def pick(self, full: T, *, tiny: T) -> T:
        """Return `tiny` in a tiny run, else `full`."""
        return tiny if self.tiny else full

    @property
    def num_threads(self) -> int:
        """Threads for decoding."""
        return self.pick(len(os.sched_getaffinity(0)), tiny=1)


def times_ms(
    function: Callable[[], object], *, setting: Setting, round_s: float = 0.7
) -> list[float]:
    """Measure the milliseconds of a call in three rounds of many.

    The device is synchronised at a round's end alone, as a training does not wait
    either. The number of calls is fixed before: a host runs so far ahead of its device
    that the clock would end a round long before the device has.
    """
    timer = Timer(
        "function()",
        timer=functools.partial(_finished_s, setting.device),
        globals={"function": function},
        num_threads=torch.get_num_threads(),
    )
    wanted_s = setting.pick(round_s, tiny=0.0)
    num_calls = math.ceil(wanted_s / timer.timeit(1).mean)
    num_calls = min(max(num_calls, 1), _MAX_CALLS)
    num_rounds = setting.pick(3, tiny=1)
    return [1000 * timer.timeit(num_calls).mean for _ in range(num_rounds)]


def _finished_s(device: torch.device) -> float:
    synchronize(device)
    return time.perf_counter()


def encoded_images(setting: Setting) -> list[bytes]:
    """Cut JPEGs like ImageNet's, or read those that an earlier stage cut."""
    folder = setting.work / "photographs"
    if not folder.exists():
        num_images = setting.pick(512, tiny=8)
        cut_photographs(folder, num_images=num_images, seed=0)
    return [path.read_bytes() for path in sorted(folder.iterdir())]


def rows_of(images: Sequence[bytes]) -> Rows:
    """Build rows like a reader's."""
    sizes = [Image.open(io.BytesIO(image)).size for image in images]
    widths, heights = np.array(sizes).T
    ids = np.arange(len(images))
    return Rows(
        views=[np.frombuffer(image, np.uint8) for image in images],
        labels=np.zeros_like(ids),
        ids=ids,
        repeats=np.zeros_like(ids),
        heights=heights,
        widths=widths,
        keys=pa.array([f"image {number}" for number in ids]),
    )
