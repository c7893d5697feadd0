"""Count the CPU seconds of our processes, and of the whole machine, from /proc."""

from __future__ import annotations

import os
from pathlib import Path

# Places after the command's name in /proc/PID/stat; see proc(5).
_PARENT = 1
_TIMES = slice(11, 15)  # user and system, own and of children that ended
# Of the first line of /proc/stat: all but what was idle, or waited for a disk.
_BUSY = (1, 2, 3, 6, 7, 8)


def cpu_seconds() -> float:
    """Sum up user and system seconds of this process and its descendants.

    Those of a process that ended are its parent's, where that one waited for it.
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
    """Sum up the busy seconds of all cores, those that a virtual machine lost too."""
    fields = Path("/proc/stat").read_text().splitlines()[0].split()
    return sum(int(fields[place]) for place in _BUSY) / os.sysconf("SC_CLK_TCK")


def _is_ours(process: int, *, parents: dict[int, int]) -> bool:
    while process in parents:
        if process == os.getpid():
            return True
        process = parents[process]
    return False
