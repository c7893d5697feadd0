"""Describe the machine, and measure its CPU use by us and by others."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import re
import time
from pathlib import Path
from typing import Any

import torch

_PACKAGES = (
    *("mosaicml-streaming", "numpy", "nvidia-dali-cuda130", "pillow", "pyarrow"),
    *("ray", "timm", "torch", "torchvision", "webdataset"),
)
# Places after the command's name in /proc/PID/stat; see proc(5).
_PARENT = 1
_TIMES = slice(11, 15)  # user and system, own and of children that ended
# Of the first line of /proc/stat: all but what was idle, or waited for a disk.
_BUSY = (1, 2, 3, 6, 7, 8)


def machine() -> dict[str, Any]:
    """Describe the machine and the versions of what ran on it."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": cpu_name(Path("/proc/cpuinfo").read_text()),
        "num_cpus": len(os.sched_getaffinity(0)),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": versions,
    }


def cpu_name(cpuinfo: str) -> str:
    """Parse the processor's name from /proc/cpuinfo, which some architectures lack."""
    found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    return found.group(1) if found else platform.machine()


def cpu_seconds() -> float:
    """Sum the user and system seconds of this process and its descendants.

    Those of an ended process count for its parent if that waited for it.
    """
    parents: dict[int, int] = {}
    ticks: dict[int, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it has ended meanwhile
        parents[int(folder.name)] = int(fields[_PARENT])
        ticks[int(folder.name)] = sum(map(int, fields[_TIMES]))
    family = (process for process in ticks if _is_ours(process, parents=parents))
    return sum(ticks[process] for process in family) / os.sysconf("SC_CLK_TCK")


def machine_cpu_seconds() -> float:
    """Sum the busy seconds of all cores, including a virtual machine's stolen time."""
    fields = Path("/proc/stat").read_text().splitlines()[0].split()
    return sum(int(fields[place]) for place in _BUSY) / os.sysconf("SC_CLK_TCK")


def _is_ours(process: int, *, parents: dict[int, int]) -> bool:
    while process in parents:
        if process == os.getpid():
            return True
        process = parents[process]
    return False
