"""Time a case's steps in a process of its own, and the memory that they take."""

from __future__ import annotations

import ctypes
import functools
import math
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch
from torch.profiler import profile, supported_activities

from benchmarks.model_cases import NUM_CLASSES, Case, Steps, build_steps, run_of
from benchmarks.rounds import Record, call_ms
from pipelines.hardware.device import synchronize
from pipelines.training.model import count_macs, count_parameters, shapes_of

_MIB = 1 << 20
_MAX_STEPS = 1000
_NUM_WARM_STEPS = {"cpu": 1, "cuda": 3}
_SIDES = {"cpu": (512, 1024, 2048, 3072), "cuda": (2048, 4096, 8192, 16384)}
_MATRIX_S = 0.1
_NUM_KERNELS = 60
_PROC = Path("/proc/self")


def open_process(device: str) -> ProcessPoolExecutor:
    """Make the process that a case keeps for all rounds: it compiles once."""
    # torch takes seconds to import: one process does, and the others fork off it,
    # which CUDA does not allow.
    method = "spawn" if device == "cuda" else "forkserver"
    context = multiprocessing.get_context(method)
    context.set_forkserver_preload([__name__])
    return ProcessPoolExecutor(max_workers=1, mp_context=context)


def time_case(pool: ProcessPoolExecutor, case: Case, *, round_s: float) -> Record:
    """Time a round in a case's process."""
    try:
        return pool.submit(time_steps, case, round_s=round_s).result()
    except BrokenProcessPool as error:
        raise ValueError(
            "expected a process that times steps, got one that died; where the system "
            "killed it memory was short: lower --batch-size"
        ) from error


def time_steps(case: Case, *, round_s: float) -> Record:
    """Time steps for about `round_s`, in this process; the first call warms up."""
    steps, begun = _begin(case)
    num_steps = math.ceil(1000 * round_s / begun["warm_step_ms"])
    num_steps = min(max(num_steps, 1), _MAX_STEPS)
    # Takes the memory again that was given back to the other processes.
    steps(1)
    step_ms = call_ms(lambda: steps(num_steps), device=case.device) / num_steps
    give_memory_back(case.device)
    return {
        "step_ms": step_ms,
        "images_per_s": 1000 * case.batch_size / step_ms,
        "num_steps": num_steps,
        **begun,
    }


def kernels(case: Case) -> str:
    """Profile a step: a table of its kernels, the longest first."""
    steps, _ = _begin(case)
    with profile(activities=supported_activities()) as profiled:
        steps(1)
        synchronize(torch.device(case.device))
    return profiled.key_averages().table(
        sort_by=f"self_{case.device}_time_total", row_limit=_NUM_KERNELS
    )


@functools.cache
def _begin(case: Case) -> tuple[Steps, Record]:
    """Build a case's steps, compile and warm them, and measure their memory."""
    steps = build_steps(case)
    first_ms = call_ms(lambda: steps(1), device=case.device)
    num_warm = _NUM_WARM_STEPS[case.device]
    warm_ms = call_ms(lambda: steps(num_warm), device=case.device)
    memory = memory_mb(steps, device=case.device)
    times = {"first_step_s": first_ms / 1000, "warm_step_ms": warm_ms / num_warm}
    return steps, {**times, **memory}


def memory_mb(steps: Steps, *, device: str) -> Record:
    """Measure the memory before a step, and the peak during it.

    Of tensors on a GPU, of the whole process on a CPU, libraries too.
    """
    give_memory_back(device)
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        at_rest_mb = torch.cuda.memory_allocated() / _MIB
        steps(1)
        torch.cuda.synchronize()
        peak_mb = torch.cuda.max_memory_allocated() / _MIB
    else:
        (_PROC / "clear_refs").write_text("5")  # the peak is from here: see proc(5)
        at_rest_mb = _status_mb("VmRSS")
        steps(1)
        peak_mb = _status_mb("VmHWM")
    return {"at_rest_mb": at_rest_mb, "peak_mb": peak_mb}


def give_memory_back(device: str) -> None:
    """Release cached free memory to the system."""
    if device == "cuda":
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


def size_of(case: Case) -> dict[str, int]:
    """Count parameters, and an image's multiply-adds, on the meta device."""
    model = shapes_of(run_of(case).model, num_classes=NUM_CLASSES)
    macs = count_macs(model, img_size=case.img_size)
    return {"num_params": count_parameters(model).num, "macs": macs}


def matrix_rate(dtype: torch.dtype, *, device: str) -> Record:
    """Measure the FLOP/s of square matrix products: the best of several sides."""
    best = 0.0
    for side in _SIDES[device]:
        one, other = (torch.randn(side, side, device=device).to(dtype) for _ in "ab")
        product = functools.partial(torch.mm, one, other, out=one @ other)
        times_ms = [call_ms(product, device=device)]
        while sum(times_ms) < 1000 * _MATRIX_S:
            times_ms.append(call_ms(product, device=device))
        best = max(best, 2 * side**3 / (min(times_ms) / 1000))
    give_memory_back(device)
    return {"flops_per_s": best}
