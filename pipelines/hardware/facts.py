"""Facts about a worker's host and GPU, for tags of a run."""

from __future__ import annotations

import os
import platform
import subprocess
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch

from pipelines.hardware.device import gpu_facts

GPU, PRECISION = "gpu", "precision"
_COMMAND_TIMEOUT_S = 10
_TAGS = {
    "cpu": "hardware.cpu",
    "num_cpus": "hardware.num_cpus",
    "memory_gib": "hardware.memory_gib",
    PRECISION: "hardware.precision",
    "driver": "version.nvidia-driver",
    "cuda": "version.cuda",
    "cudnn": "version.cudnn",
    "nccl": "version.nccl",
}
_GPUS_TAG = "hardware.gpus"
_ASK_DRIVER = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")


def host_facts() -> dict[str, str]:
    """Describe this host's processors, and its memory in GiB."""
    page_bytes, num_pages = os.sysconf("SC_PAGE_SIZE"), os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": _cpu_name(),
        "num_cpus": str(os.cpu_count()),
        "memory_gib": f"{page_bytes * num_pages / 2**30:.0f}",
    }


def worker_facts(device: torch.device, *, precision: str) -> dict[str, str]:
    """Describe the host of a worker, its GPU if it has one, and what it computes in."""
    gpu = gpu_facts(device)
    if gpu and (driver := output_of(*_ASK_DRIVER)):
        # One line a GPU of the host, all the same.
        gpu["driver"] = driver.splitlines()[0].strip()
    return host_facts() | gpu | {PRECISION: precision}


def tags_of(workers: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """Merge all workers' facts into tags; where they differ, all values are listed."""
    tags = {
        tag: ", ".join(found)
        for name, tag in _TAGS.items()
        if (found := dict.fromkeys(told[name] for told in workers if name in told))
    }
    if gpus := gpu_summary(told[GPU] for told in workers if GPU in told):
        tags[_GPUS_TAG] = gpus
    return tags


def gpu_summary(names: Iterable[str]) -> str:
    """Summarize GPUs by kind: `8 x NVIDIA H200`."""
    counts = Counter(name.strip() for name in names)
    return ", ".join(f"{count} x {name}" for name, count in sorted(counts.items()))


def without_bfloat16(workers: Sequence[Mapping[str, str]]) -> str:
    """Describe the cost of GPUs without bfloat16, where it is wanted; else "".

    Float16 would need a loss scaler, which skips steps by the same flag of the
    optimiser's as `pipelines.training.nonfinite`, and a state of its own in each
    checkpoint.
    """
    slow = [
        told[GPU] for told in workers if GPU in told and told[PRECISION] != "bfloat16"
    ]
    if not slow:
        return ""
    return (
        f"steps compute in float32 on {gpu_summary(slow)}, for want of bfloat16: "
        "activations take up to twice the memory, and products use no tensor cores; "
        "raise --optim.num-accumulation if memory is short"
    )


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    found = (line.partition(":")[2] for line in lines if line.startswith("model name"))
    return next(found, platform.machine()).strip()


def output_of(*command: str, cwd: Path | None = None) -> str | None:
    """Run a program and return its output; None if missing, failing or too slow."""
    try:
        done = subprocess.run(
            command,
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=_COMMAND_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
