"""Measure the memory that a process has needed at most."""

from __future__ import annotations

import resource
import sys

import torch

_MIB = 1 << 20


def peak_memory_mb(device: torch.device) -> float:
    """Give the most MiB so far: of tensors on a GPU, of the whole process on a CPU.

    A process's peak includes its libraries: half a gigabyte or more.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / _MIB
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts in KiB, macOS in bytes.
    return peak / _MIB if sys.platform == "darwin" else peak / 1024
