"""Log the images of every training step, so that an epoch can be audited.

Each worker of each attempt writes its own CSV file, one line per image: the step, the
epoch, the image's row in the set and its repetition, and a CRC-32 of its pixels.
After a failure steps are repeated; `trained` returns those that the weights kept.
"""

from __future__ import annotations

import csv
import itertools
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from pipelines.data.batch import Batch
from pipelines.transforms.rows import DRAW_STRIDE

_NAME = "{attempt:020d}-{step:08d}-{rank:05d}.csv"


@dataclass(frozen=True, kw_only=True, order=True)
class Trained:
    """Record of an image that a step was trained on."""

    step: int
    """Number of the step, from 0."""
    epoch: int
    row: int
    repeat: int
    crc32: int


class AuditLog:
    """CSV log of the images that one worker trains on, from a step on.

    Args:
        attempt: The same number for all workers of a group, larger for a later group.
    """

    def __init__(self, folder: Path, *, attempt: int, step: int, rank: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        name = _NAME.format(attempt=attempt, step=step, rank=rank)
        # Closed by the process's end, a kill included: every step is flushed.
        self._file = (folder / name).open("w", newline="")
        self._lines = csv.writer(self._file)

    def __call__(self, batch: Batch, step: int) -> None:
        """Log a micro-batch of a step."""
        pixels = batch.images.permute(0, 2, 3, 1).cpu().contiguous()
        in_bytes = pixels.view(torch.uint8).numpy()  # NumPy has no bfloat16
        for at, draw_id in enumerate(batch.draw_ids.tolist()):
            if draw_id >= 0:
                repeat, row = divmod(draw_id, DRAW_STRIDE)
                crc32 = zlib.crc32(in_bytes[at])
                self._lines.writerow((step, batch.epoch, row, repeat, crc32))
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def trained(folder: Path) -> list[Trained]:
    """Read which images a run's weights were trained on, over all attempts, by step.

    An attempt that begins at a step supersedes earlier ones from that step on.
    """
    kept: list[Trained] = []
    paths = sorted(folder.glob("*.csv"))
    for _, of_attempt in itertools.groupby(paths, lambda path: path.stem.split("-")[0]):
        files = list(of_attempt)
        first = int(files[0].stem.split("-")[1])
        kept = [item for item in kept if item.step < first]
        kept += [item for path in files for item in _lines_of(path)]
    return sorted(kept)


def _lines_of(path: Path) -> Iterator[Trained]:
    text = path.read_text()
    whole = text[: text.rfind("\n") + 1]  # a kill may cut the last line off
    for line in csv.reader(whole.splitlines()):
        step, epoch, row, repeat, crc32 = map(int, line)
        yield Trained(step=step, epoch=epoch, row=row, repeat=repeat, crc32=crc32)
