"""Time the first batch and the steady rate, and compare rounds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from benchmarks.machine import cpu_seconds, machine_cpu_seconds
from benchmarks.work import Loaded

_MIN_BATCHES = 2


@dataclass(frozen=True, kw_only=True)
class Clock:
    """Sources of time, which tests replace."""

    now_s: Callable[[], float] = time.perf_counter
    cpu_s: Callable[[], float] = cpu_seconds
    machine_cpu_s: Callable[[], float] = machine_cpu_seconds
    wait_for_device: Callable[[], object] = lambda: None
    """Waits for a GPU's queued work."""


@dataclass(frozen=True, kw_only=True)
class Round:
    """Result of one loader's round."""

    first_batch_s: float
    """From asking for batches to the first one."""
    num_images: int
    """Images that came within `seconds`."""
    seconds: float
    cpu_s: float
    other_cpu_s: float
    """CPU seconds that the rest of the machine took meanwhile: a disturbance."""

    @property
    def images_per_s(self) -> float:
        """Images per second."""
        return self.num_images / self.seconds

    @property
    def other_cores(self) -> float:
        """Mean number of cores busy with the rest of the machine."""
        return self.other_cpu_s / self.seconds

    @property
    def images_per_cpu_s(self) -> float:
        """Images per CPU second."""
        return self.num_images / self.cpu_s


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Median, lowest and highest of some rounds."""

    median: float
    low: float
    high: float

    def shown(self, form: str) -> str:
        """Format all three values."""
        return f"{self.median:{form}} [{self.low:{form}}..{self.high:{form}}]"


def time_batches(
    batches: Iterator[Loaded],
    *,
    look: Callable[[Sequence[Loaded]], None],
    num_looked_at: int,
    warm_s: float,
    measure_s: float,
    clock: Clock,
) -> Round:
    """Time a loader without any work on its batches.

    Args:
        look: Called with the first batches; raises if they are not what was asked.
        num_looked_at: How many.
        warm_s: Batches that come within this time after that are not counted. It also
            drains what was loaded ahead while the first batches were looked at.
        measure_s: The first batch after this time ends the round.
    """
    start_s = clock.now_s()
    first = [next(batches)]
    first_batch_s = clock.now_s() - start_s
    first += [next(batches) for _ in range(num_looked_at - 1)]
    look(first)
    first.clear()
    _count_images(batches, seconds=warm_s, clock=clock)
    start_machine_s, start_cpu_s = clock.machine_cpu_s(), clock.cpu_s()
    num_images, seconds = _count_images(batches, seconds=measure_s, clock=clock)
    cpu_s = clock.cpu_s() - start_cpu_s
    machine_s = clock.machine_cpu_s() - start_machine_s
    return Round(
        first_batch_s=first_batch_s,
        num_images=num_images,
        seconds=seconds,
        cpu_s=cpu_s,
        other_cpu_s=max(machine_s - cpu_s, 0.0),
    )


def _count_images(
    batches: Iterator[Loaded], *, seconds: float, clock: Clock
) -> tuple[int, float]:
    """Take batches for some seconds; return their images and the time taken."""
    start_s = clock.now_s()
    num_images = num_batches = 0
    while num_batches < _MIN_BATCHES or clock.now_s() - start_s < seconds:
        num_images += len(next(batches)[1])
        num_batches += 1
    clock.wait_for_device()
    return num_images, clock.now_s() - start_s


def spread(values: Sequence[float]) -> Spread:
    """Compute the median, lowest and highest of at least one value."""
    return Spread(median=statistics.median(values), low=min(values), high=max(values))


def ratios(ours: Sequence[float], others: Sequence[float]) -> Spread:
    """Compare two loaders round by round, so that a machine's drift cancels out.

    If one lacks its last round, the rounds before it are compared.
    """
    return spread([one / other for one, other in zip(ours, others, strict=False)])


def call_ms(function: Callable[[], object], *, device: str) -> float:
    """Time one call, with the GPU work that it queued."""
    if device == "cuda":
        torch.cuda.synchronize()
    start_s = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - start_s)
