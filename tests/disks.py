"""Mount a small disk that can be filled up or made read-only."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.waiting import wait_for


class Disk:
    """A file system in memory, which only root can mount."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._filler = folder / "filler"

    def fill(self) -> None:
        """Fill the disk up to the last byte."""
        with self._filler.open("ab", buffering=0) as file:
            with contextlib.suppress(OSError):
                while file.write(bytes(1 << 20)):
                    pass
            assert file.tell()

    def free(self) -> None:
        """Delete the file that fills the disk."""
        self._filler.unlink()

    def forbid(self) -> None:
        """Make the disk read-only, waiting for writes in progress."""
        wait_for(lambda: self._mounted("remount,ro"), what="the disk to be read-only")

    def allow(self) -> None:
        """Make the disk writable again."""
        assert self._mounted("remount,rw")

    def _mounted(self, options: str) -> bool:
        command = ["mount", "-o", options, str(self.folder)]
        return subprocess.run(command, capture_output=True).returncode == 0


@contextlib.contextmanager
def small_disk(folder: Path, *, size_mb: int) -> Iterator[Disk]:
    """Mount a disk of a size; skip the test if that is not allowed."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size_mb}m", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("only root may mount a disk, and not in every container")
    try:
        yield Disk(folder)
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
