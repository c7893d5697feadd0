"""Key logs: what the weights were trained on, over attempts that began anew."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from pipelines.data.batch import Batch
from pipelines.transforms.rows import DRAW_STRIDE
from pipelines.worker.audit_log import AuditLog, trained


def batch(*draw_ids: int, epoch: int = 0) -> Batch:
    images = torch.stack([torch.full((3, 2, 2), float(i)) for i in draw_ids])
    return Batch(
        images=images.to(memory_format=torch.channels_last),
        labels=torch.zeros(len(draw_ids), dtype=torch.int64),
        weights=torch.ones(len(draw_ids)),
        draw_ids=np.array(draw_ids),
        epoch=epoch,
        index=0,
        micro=0,
        global_rows=len(draw_ids),
        ends_step=True,
        ends_epoch=False,
    )


def write(
    folder: Path, *, attempt: int, step: int, rank: int, batches: list[Batch]
) -> None:
    log = AuditLog(folder, attempt=attempt, step=step, rank=rank)
    for at, item in enumerate(batches):
        log(item, step + at)
    log.close()


def test_an_attempt_makes_void_what_came_after_its_start(tmp_path: Path) -> None:
    again = DRAW_STRIDE  # the image of row 0 once more
    write(
        tmp_path, attempt=5, step=0, rank=0, batches=[batch(0, 1), batch(2), batch(3)]
    )
    write(tmp_path, attempt=5, step=0, rank=1, batches=[batch(again), batch(7, -1)])
    write(tmp_path, attempt=9, step=1, rank=0, batches=[batch(4), batch(5, epoch=1)])
    found = [
        (item.step, item.epoch, item.row, item.repeat) for item in trained(tmp_path)
    ]
    assert found == [
        (0, 0, 0, 0),
        (0, 0, 0, 1),
        (0, 0, 1, 0),
        (1, 0, 4, 0),
        (2, 1, 5, 0),
    ]


def test_pixels_leave_a_mark_whatever_their_strides(tmp_path: Path) -> None:
    one = batch(3)
    other = Batch(**{**vars(one), "images": one.images.contiguous() + 0.5})
    plain = Batch(**{**vars(one), "images": one.images.contiguous()})
    write(tmp_path, attempt=0, step=0, rank=0, batches=[one, plain, other])
    marks = [item.crc32 for item in trained(tmp_path)]
    assert marks[0] == marks[1] != marks[2]


def test_bfloat16_pixels_leave_a_mark(tmp_path: Path) -> None:
    one = batch(3)
    rounded = Batch(**{**vars(one), "images": one.images.bfloat16()})
    other = Batch(**{**vars(one), "images": one.images.bfloat16() * 1.01})
    write(tmp_path, attempt=0, step=0, rank=0, batches=[rounded, rounded, other])
    marks = [item.crc32 for item in trained(tmp_path)]
    assert marks[0] == marks[1] != marks[2]


def test_a_line_that_a_kill_cut_off_is_left_out(tmp_path: Path) -> None:
    write(tmp_path, attempt=0, step=0, rank=0, batches=[batch(3), batch(4)])
    (path,) = tmp_path.glob("*.csv")
    path.write_text(path.read_text()[:-8])
    assert [item.row for item in trained(tmp_path)] == [3]
    assert trained(tmp_path / "none") == []
