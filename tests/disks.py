"""Have a small disk of our own, which can be full or forbidden."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.waiting import wait_for


class Disk:
    """Be a file system in memory, of which only root can have one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._filler = folder / "filler"

    def fill(self) -> None:
        """Leave not a byte free."""
        with self._filler.open("ab", buffering=0) as file:
            with contextlib.suppress(OSError):
                while file.write(bytes(1 << 20)):
                    pass
            assert file.tell()

    def free(self) -> None:
        """Take away what it was filled with."""
        self._filler.unlink()

    def forbid(self) -> None:
        """Refuse all that is written; what is being written now is waited for."""
        wait_for(lambda: self._mounted("remount,ro"), what="the disk to be read-only")

    def allow(self) -> None:
        """Take writes again."""
        assert self._mounted("remount,rw")

    def _mounted(self, options: str) -> bool:
        command = ["mount", "-o", options, str(self.folder)]
        return subprocess.run(command, capture_output=True).returncode == 0


@contextlib.contextmanager
def small_disk(folder: Path, *, size_mb: int) -> Iterator[Disk]:
    """Mount a disk of a size; skip the test where that is not allowed."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size_mb}m", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("only root may mount a disk, and not in every container")
    try:
        yield Disk(folder)
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
