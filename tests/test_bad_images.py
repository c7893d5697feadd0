"""Bad images are named once, in the log and in a table that a resumed run adds to."""

from __future__ import annotations

from typing import Any

import numpy as np

from pipelines.data.epoch_plan import GroupTable
from pipelines.events.bad_images import BadImageLog, BadImageTeller, NamedBadImage
from pipelines.transforms.rows import BadImage


def image(number: int, *, split: str = "train", reason: str = "cut off") -> Any:
    return NamedBadImage(
        split=split, shard="a.parquet", key=f"k,{number}", reason=reason
    )


def test_each_is_named_once_and_the_table_grows() -> None:
    kept: list[str] = []
    log = BadImageLog(keep=kept.append)
    log.flush()
    assert kept == []
    line = log.add(image(1))
    for part in ("k,1", "a.parquet", "train", "cut off"):
        assert part in line
    assert log.add(image(1)) == ""
    assert log.add(image(1, split="val")) != ""
    log.flush()
    log.flush()
    assert kept == [
        "split,shard,key,reason\n"
        'train,a.parquet,"k,1",cut off\n'
        'val,a.parquet,"k,1",cut off\n'
    ]
    # A resumed run begins with the table, and names nothing of it again.
    resumed = BadImageLog(keep=kept.append, before=kept[0])
    assert resumed.add(image(1)) == ""
    resumed.flush()
    assert len(kept) == 1
    resumed.add(image(2))
    resumed.flush()
    assert kept[1].startswith(kept[0])
    assert kept[1].count("\n") == 4


def test_a_worker_tells_each_once_with_its_shard() -> None:
    groups = GroupTable(
        paths=("a.parquet", "b.parquet"),
        num_groups=np.array([1, 2], np.int32),
        num_rows=np.array([5, 3, 4], np.int32),
    )
    posted: list[NamedBadImage] = []
    tell = BadImageTeller(posted.append, split="val", groups=groups)
    rows = [BadImage(row_id=row, key=f"k{row}", reason="empty") for row in (4, 5, 11)]
    tell((rows[0], rows[1]))
    tell((rows[1], rows[2]))
    assert [(named.key, named.shard) for named in posted] == [
        ("k4", "a.parquet"),
        ("k5", "b.parquet"),
        ("k11", "b.parquet"),
    ]
