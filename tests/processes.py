"""Find processes by name among our own descendants."""

from __future__ import annotations

import os
from pathlib import Path


def descendants_named(title: str) -> list[int]:
    """List the ids of our descendants whose command line contains a title (Linux)."""
    parents: dict[int, int] = {}
    titles: dict[int, str] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            stat = (folder / "stat").read_text()
            titles[int(folder.name)] = (folder / "cmdline").read_text()
        except OSError:
            continue  # it has ended meanwhile
        parents[int(folder.name)] = int(stat.rpartition(")")[2].split()[1])
    return [
        process
        for process, text in titles.items()
        if title in text and _descends(process, parents=parents)
    ]


def _descends(process: int, *, parents: dict[int, int]) -> bool:
    while process in parents:
        if process == os.getpid():
            return True
        process = parents[process]
    return False
