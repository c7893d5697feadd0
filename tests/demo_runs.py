"""Make small shard sets and runs of the demo's kind, for tests on real Ray."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.config import Run, Scale
from pipelines.data.shard_set import CLASSES_FILE, shard_name, write_shard
from recipes.demo import demo

RECIPE = """
from pathlib import Path
from pipelines.config import Run
from pipelines.config.serialization import from_json
def small() -> Run:
    return from_json(Path(__file__).with_name("run.json").read_text())
"""
"""A recipe file for a run that lies beside it as run.json."""


def part_of_demo(
    folder: Path,
    *,
    split: str,
    num_rows: int,
    num_shards: int = 2,
    bad_rows: Sequence[int] = (),
) -> Path:
    """Write the first rows of an embedded split as a set of its own.

    The images of `bad_rows` are cut off.
    """
    data = demo().data
    origin = Path(data.train if split == "train" else data.val)
    table = pq.read_table(min(origin.glob("*.parquet"))).slice(0, num_rows)
    assert table.num_rows == num_rows
    images = table["image"].to_pylist()
    for row in bad_rows:
        images[row] = images[row][:-40]
    column = table.schema.get_field_index("image")
    table = table.set_column(column, "image", pa.array(images, pa.binary()))
    folder.mkdir(parents=True)
    shutil.copy(origin / CLASSES_FILE, folder)
    for index in range(num_shards):
        start = num_rows * index // num_shards
        stop = num_rows * (index + 1) // num_shards
        write_shard(
            folder / shard_name(split, index=index, num_shards=num_shards),
            rows=table.slice(start, stop - start),
            rows_per_group=50,
        )
    return folder


def small_demo(
    folder: Path,
    *,
    num_epochs: int,
    num_workers: int = 2,
    max_failures: int = 1,
    bad_rows: Sequence[int] = (),
    token_embed: str = "linear",
) -> Run:
    """Build a run that trains an epoch in a second or less: 301 and 101 images.

    Convolutions would be nine tenths of a step.
    """
    base = demo()
    model = dataclasses.replace(
        base.model,
        kwargs={
            "token_embed": token_embed,
            "depth": 1,
            "embed_dim": 32,
            "num_heads": 2,
        },
        drop_path_rate=0.1,
    )
    data = dataclasses.replace(
        base.data,
        train=str(
            part_of_demo(
                folder / "train", split="train", num_rows=301, bad_rows=bad_rows
            )
        ),
        val=str(
            part_of_demo(
                folder / "val", split="val", num_rows=101, bad_rows=bad_rows[:1]
            )
        ),
        batch_size=32,
        eval_batch_size=32,
        shuffle_rows=100,
    )
    optim = dataclasses.replace(
        base.optim, num_epochs=num_epochs, warmup_epochs=1, mixup=0.2, cutmix=0.2
    )
    return dataclasses.replace(
        base,
        recipe="small",
        model=model,
        data=data,
        optim=optim,
        scale=Scale(num_workers=num_workers, max_failures=max_failures),
        storage=str(folder / "runs"),
        log_every_steps=5,
    )
