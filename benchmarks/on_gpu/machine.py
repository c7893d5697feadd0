"""List the versions, and measure the ceilings: copies and products."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import shutil
import subprocess
from typing import Any

import torch

from benchmarks.on_gpu.rates import device_of, times_ms
from benchmarks.on_gpu.stages import Figures, Setting, Tasks
from pipelines.hardware.device import (
    download,
    free_memory,
    gpus_here,
    upload,
    wait_for_stream,
)

_PACKAGES = (
    *("torch", "timm", "triton", "numpy", "pyarrow", "pillow", "ray", "mlflow"),
    *("nvidia-dali-cuda130", "nvidia-nvimgcodec-cu13"),
)
_QUERY = "name,driver_version,memory.total,clocks.sm,clocks.max.sm,power.limit"
_TYPES = {
    "bfloat16": (torch.bfloat16, "highest"),
    "float16": (torch.float16, "highest"),
    "tf32": (torch.float32, "high"),
    "float32": (torch.float32, "highest"),
}


def tasks(setting: Setting) -> Tasks:
    """List the versions, and measure each ceiling."""
    return {
        "versions": _versions,
        "device": lambda: _device(setting),
        "copy": lambda: _copy(setting),
        "from and to the host": lambda: _host(setting),
        **{
            f"products, {name}": functools.partial(_products, setting, name)
            for name in _TYPES
        },
    }


def _versions() -> Figures:
    found: dict[str, Any] = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    for tool in ("cc", "nvcc"):  # torch.compile needs the first
        found[tool] = shutil.which(tool) or "none"
    return found


def _device(setting: Setting) -> Figures:
    num_gpus, memory = gpus_here()
    try:
        said = subprocess.run(
            ["nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=20,
        ).stdout.strip()
    except (OSError, subprocess.TimeoutExpired) as error:
        said = f"none: {error}"
    device = device_of(setting)
    return {
        "device": str(device),
        "num_gpus": num_gpus,
        "memory_gib": memory / 2**30,
        "free_gib": free_memory(device) / 2**30,
        "nvidia_smi": said,
        "cuda": torch.version.cuda or "none",
        "cudnn": torch.backends.cudnn.version() or 0,
        "num_cpus": len(os.sched_getaffinity(0)),
    }


def _copy(setting: Setting) -> Figures:
    num_bytes = setting.pick(4 << 30, tiny=4 << 20)
    source = torch.rand(num_bytes // 4, device=device_of(setting))
    target = torch.empty_like(source)
    found = times_ms(lambda: target.copy_(source), setting=setting)
    # Each byte is read and written.
    return {"tb_per_s": 2 * num_bytes / found.median / 1e9, "ms": found.median}


def _host(setting: Setting) -> Figures:
    """Measure copies through pinned memory, as of batches and checkpoints."""
    num_bytes, device = setting.pick(1 << 30, tiny=4 << 20), device_of(setting)
    there = upload(torch.rand(num_bytes // 4), device)

    def back() -> None:
        download(there)
        wait_for_stream(device)

    host = download(there)
    wait_for_stream(device)
    up, down = (
        times_ms(function, setting=setting).median
        for function in (lambda: there.copy_(host, non_blocking=True), back)
    )
    return {
        "to_device_gb_per_s": num_bytes / up / 1e6,
        "to_host_gb_per_s": num_bytes / down / 1e6,
    }


def _products(setting: Setting, name: str) -> Figures:
    dtype, precision = _TYPES[name]
    rates, device = {}, device_of(setting)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        for side in setting.pick((4096, 8192, 16384), tiny=(64,)):
            # Not zeros, on which a GPU is faster.
            one, other = (torch.randn(side, side, device=device) for _ in range(2))
            one, other = one.to(dtype), other.to(dtype)
            out = one @ other
            multiply = functools.partial(torch.mm, one, other, out=out)
            spent_ms = times_ms(multiply, setting=setting, round_s=0.2).low
            rates[str(side)] = 2 * side**3 / spent_ms / 1e9
    finally:
        torch.set_float32_matmul_precision(before)
    return {"tflop_per_s": rates}
