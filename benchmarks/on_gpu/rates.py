"""Time calls on a device in rounds."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch

from benchmarks.on_gpu.stages import Setting
from benchmarks.timing import Spread, spread
from pipelines.hardware.device import find_device, synchronize

_MAX_CALLS = 10_000


def device_of(setting: Setting) -> torch.device:
    """Return the setting's device, found in this process."""
    return find_device(setting.device)


def times_ms(
    function: Callable[[], object], *, setting: Setting, round_s: float | None = None
) -> Spread:
    """Measure the milliseconds of a call in rounds of many, after two calls' warm-up.

    The device is synchronised at a round's end alone, as a training does not wait
    either. The number of calls is fixed before: a host runs so far ahead of its device
    that the clock would end a round long before the device has.

    Args:
        round_s: Seconds of a round; the setting's by default.
    """
    device = device_of(setting)
    function()
    seconds = _seconds(function, 1, device=device)
    wanted_s = setting.round_s if round_s is None else setting.pick(round_s, tiny=0.0)
    num_calls = min(max(math.ceil(wanted_s / seconds), 1), _MAX_CALLS)
    rounds = range(setting.num_rounds)
    spent_s = [_seconds(function, num_calls, device=device) for _ in rounds]
    return spread([1000 * of / num_calls for of in spent_s])


def _seconds(
    function: Callable[[], object], num_calls: int, *, device: torch.device
) -> float:
    """Measure the seconds of some calls, until the device has finished them."""
    synchronize(device)
    start_s = time.perf_counter()
    for _ in range(num_calls):
        function()
    synchronize(device)
    return time.perf_counter() - start_s
