"""Time steps in rounds, each case in its own process with its own memory.

The processes stay for all rounds, and one of them works at a time: rounds are
interleaved, and nothing is compiled twice.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import multiprocessing
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch

from benchmarks.machine import cpu_seconds, machine_cpu_seconds
from benchmarks.model_cases import Case, Steps, build_steps
from benchmarks.timing import call_ms

T = TypeVar("T")
_MIB = 1 << 20
_MAX_STEPS = 1000
_NUM_WARM_STEPS = {"cpu": 1, "cuda": 3}
_SIDES = {"cpu": (512, 1024, 2048, 3072), "cuda": (2048, 4096, 8192, 16384)}
_MATRIX_S = 0.1
_PROC = Path("/proc/self")


@dataclass(frozen=True, kw_only=True)
class Begun:
    """Results of a case's first steps."""

    first_step_s: float
    """Includes compilation."""
    warm_step_ms: float
    at_rest_mb: float
    """MiB between the steps, of tensors on a GPU, of the whole process on a CPU:
    weights, their average, the optimiser's state; on a CPU libraries too."""
    peak_mb: float
    """Peak during a step."""


@dataclass(frozen=True, kw_only=True)
class StepRound:
    """Result of one round of one case."""

    step_ms: float
    num_steps: int
    other_cores: float
    """Cores that the rest of the machine was busy on meanwhile: a disturbance."""


@dataclass(frozen=True, kw_only=True)
class Rounds:
    """Results of all rounds of one case."""

    begun: Begun
    rounds: tuple[StepRound, ...]


def time_cases(
    cases: Sequence[Case],
    *,
    num_rounds: int,
    round_s: float,
    between: Callable[[], None],
    on_round: Callable[[Mapping[Case, Rounds]], None],
) -> None:
    """Time all cases in interleaved rounds.

    A case's first steps come before its first round, not before all cases' rounds: an
    interruption leaves the rounds so far.

    Args:
        round_s: Duration of one case's round, or one step if that is longer.
        between: Called before each round over all cases.
        on_round: Callback with all rounds so far, after each.

    Raises ValueError, naming the case, if its process fails.
    """
    with contextlib.ExitStack() as stack:
        pools = {case: stack.enter_context(_pool(case)) for case in cases}
        for case in cases:
            # Importing takes CPUs from those that are timed.
            _ask(pools[case], case, has_imported)
        found: dict[Case, Rounds] = {}
        for number in range(num_rounds):
            between()
            for case, pool in pools.items():
                before = found.get(case)
                if before is None:
                    before = Rounds(begun=_ask(pool, case, begin), rounds=())
                last = _round(pool, case, begun=before.begun, round_s=round_s)
                found[case] = replace(before, rounds=(*before.rounds, last))
                print(
                    f"round {number + 1} of {num_rounds}  {case.label:<26}"
                    f"{case.stage:<14}{last.step_ms:9.1f} ms  "
                    f"others on {last.other_cores:.2f} cores  "
                    f"first step {before.begun.first_step_s:.1f} s",
                    file=sys.stderr,
                )
                on_round(found)


def _pool(case: Case) -> ProcessPoolExecutor:
    """Make the process that a case keeps for all its rounds."""
    # torch takes seconds to import: one process does, and the others fork off it,
    # which CUDA does not allow.
    context = multiprocessing.get_context(
        "spawn" if case.device == "cuda" else "forkserver"
    )
    context.set_forkserver_preload([__name__])
    return ProcessPoolExecutor(max_workers=1, mp_context=context)


def _ask(pool: ProcessPoolExecutor, case: Case, function: Callable[[Case], T]) -> T:
    """Call a function of this module in a case's process."""
    try:
        return pool.submit(function, case).result()
    except BrokenProcessPool as error:
        raise ValueError(
            f"{case.label}, {case.stage}: expected a process that times steps, got one "
            "that died; where the system killed it memory was short: lower --batch-size"
        ) from error
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{case.label}, {case.stage}: {error}") from error


def _round(
    pool: ProcessPoolExecutor, case: Case, *, begun: Begun, round_s: float
) -> StepRound:
    """Time a round, and measure the machine's other load meanwhile."""
    num_steps = math.ceil(1000 * round_s / begun.warm_step_ms)
    num_steps = min(max(num_steps, 1), _MAX_STEPS)
    start_s, machine_s, ours_s = time.monotonic(), machine_cpu_seconds(), cpu_seconds()
    step_ms = _ask(pool, case, functools.partial(time_steps, num_steps=num_steps))
    others_s = machine_cpu_seconds() - machine_s - (cpu_seconds() - ours_s)
    return StepRound(
        step_ms=step_ms,
        num_steps=num_steps,
        other_cores=max(others_s, 0.0) / (time.monotonic() - start_s),
    )


@functools.cache
def _steps_of(case: Case) -> Steps:
    """Build a case's steps once: its process trains one model in all rounds."""
    return build_steps(case)


def has_imported(case: Case) -> bool:
    """Answer once this module is there, with all that steps need."""
    return bool(case)


def begin(case: Case) -> Begun:
    """Take a case's first steps: compile, warm up, and measure the memory."""
    steps, device = _steps_of(case), torch.device(case.device)
    first_ms = call_ms(lambda: steps(1), device=device.type)
    num_warm = _NUM_WARM_STEPS[device.type]
    warm_ms = call_ms(lambda: steps(num_warm), device=device.type)
    at_rest_mb, peak_mb = _memory_mb(steps, device=device)
    give_memory_back(device)
    return Begun(
        first_step_s=first_ms / 1000,
        warm_step_ms=warm_ms / num_warm,
        at_rest_mb=at_rest_mb,
        peak_mb=peak_mb,
    )


def time_steps(case: Case, *, num_steps: int) -> float:
    """Measure the milliseconds a step, over some of them."""
    steps, device = _steps_of(case), torch.device(case.device)
    # Takes the memory again that was given back to the other processes.
    steps(1)
    spent_ms = call_ms(lambda: steps(num_steps), device=device.type)
    give_memory_back(device)
    return spent_ms / num_steps


def _memory_mb(steps: Steps, *, device: torch.device) -> tuple[float, float]:
    """Measure the memory before a step, and the peak during it."""
    give_memory_back(device)
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        at_rest_mb = torch.cuda.memory_allocated() / _MIB
        steps(1)
        torch.cuda.synchronize()
        return at_rest_mb, torch.cuda.max_memory_allocated() / _MIB
    (_PROC / "clear_refs").write_text("5")  # the peak is from here: see proc(5)
    at_rest_mb = _status_mb("VmRSS")
    steps(1)
    return at_rest_mb, _status_mb("VmHWM")


def give_memory_back(device: torch.device) -> None:
    """Release cached free memory to the system."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return
    # Of C libraries glibc has this, which keeps most.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _status_mb(name: str) -> float:
    lines = (_PROC / "status").read_text().splitlines()
    values = dict(line.split(":", 1) for line in lines)
    return int(values[name].split()[0]) / 1024


def matrix_rates(
    dtypes: Sequence[torch.dtype], *, device: str
) -> dict[torch.dtype, dict[int, float]]:
    """Measure the FLOP/s of square matrix products of several sides, by type."""
    rates = {
        dtype: {
            side: _rate(side, dtype=dtype, device=device) for side in _SIDES[device]
        }
        for dtype in dtypes
    }
    if device == "cuda":
        torch.cuda.empty_cache()
    return rates


def _rate(side: int, *, dtype: torch.dtype, device: str) -> float:
    one, other = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = one @ other

    def product() -> None:
        torch.mm(one, other, out=out)

    times_ms = [call_ms(product, device=device)]
    while sum(times_ms) < 1000 * _MATRIX_S:
        times_ms.append(call_ms(product, device=device))
    return 2 * side**3 / (min(times_ms) / 1000)
