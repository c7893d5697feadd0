"""Profile an eager and a compiled step with PyTorch's profiler."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Iterable
from typing import Any

from torch.profiler import profile, supported_activities

from benchmarks.model_cases import Case
from benchmarks.model_steps import build_steps
from benchmarks.on_gpu.compiled import cases_of
from benchmarks.on_gpu.rates import device_of
from benchmarks.on_gpu.stages import Figures, Setting, Tasks
from benchmarks.on_gpu.steps import clean_up, name_of
from pipelines.hardware.device import synchronize

_FILE = "profile.txt"
_NUM_TOP = 10
_NUM_ROWS = 60
_MAX_NAME = 60


def tasks(setting: Setting) -> Tasks:
    """Profile an eager step and the compiled one, both of the same size."""
    compiled = cases_of(setting)[0]
    eager = dataclasses.replace(compiled, stage="channels_last")
    cases = (eager, compiled)
    return {name_of(case): functools.partial(_measure, setting, case) for case in cases}


def _measure(setting: Setting, case: Case) -> Figures:
    """Profile one step after a warm-up; write its table of kernels to profile.txt."""
    clean_up(setting)
    device = device_of(setting)
    steps = build_steps(case)
    steps(setting.pick(5, tiny=1))
    synchronize(device)
    start_s = time.perf_counter()
    steps(1)
    synchronize(device)
    plain_ms = 1000 * (time.perf_counter() - start_s)
    with profile(activities=supported_activities()) as profiled:
        steps(1)
        synchronize(device)
    spent = kernels(profiled.key_averages())
    with (setting.out / _FILE).open("a") as file:
        lines = [
            f"{ms:10.3f} ms {num:6d} x  {name[:200]}"
            for name, ms, num in spent[:_NUM_ROWS]
        ]
        print(name_of(case), *lines, "", sep="\n", file=file)
    return {
        "step_ms": plain_ms,
        "kernels_ms": sum(ms for _, ms, _ in spent),
        "num_kernels": sum(num for _, _, num in spent),
        "most": [f"{name[:_MAX_NAME]} {ms:.2f} ms" for name, ms, _ in spent[:_NUM_TOP]],
    }


def kernels(events: Iterable[Any]) -> list[tuple[str, float, int]]:
    """List name, milliseconds and count of what ran, the longest first.

    Kernels if the profile has any, as on a GPU, else a CPU's operators.
    """
    found = list(events)
    on_device = [event for event in found if _is_on_device(event)]
    spent = [
        (event.key, _own_us(event) / 1000, event.count)
        for event in on_device or found
        if not getattr(event, "is_user_annotation", False)
    ]
    return sorted(spent, key=lambda of: of[1], reverse=True)


def _own_us(event: Any) -> float:
    if _is_on_device(event):
        return event.self_device_time_total
    return event.self_cpu_time_total


def _is_on_device(event: Any) -> bool:
    return event.device_type.name != "CPU"
