"""Make the images of all decoding stages: photographs like ImageNet's, and shards.

If the packages with the photographs are missing, synthetic pictures are drawn.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

from benchmarks.on_gpu.setting import Setting
from benchmarks.photographs import cut_photographs, photographs_here
from pipelines.data.shard_set import CLASSES_FILE, SCHEMA, shard_name, write_shard
from pipelines.transforms.rows import Rows

_SIZE = (1000, 750)
_NUM_MADE_UP = 3
_NUM_SHARDS = 4
_NUM_CLASSES = 10
_ROWS_PER_GROUP = 64


def encoded_images(setting: Setting) -> list[bytes]:
    """Cut the images, or read those that an earlier stage cut."""
    folder = setting.work / "photographs"
    if not folder.exists():
        partial = folder.with_name("photographs.partial")
        sources = photographs_here() or _made_up(setting.work / "made-up")
        num_images = setting.pick(512, tiny=8)
        cut_photographs(partial, num_images=num_images, seed=0, sources=sources)
        partial.rename(folder)
    return [path.read_bytes() for path in sorted(folder.iterdir())]


def _made_up(folder: Path) -> list[Path]:
    """Draw pictures with large shapes and fine grain: about a photograph's bytes."""
    folder.mkdir(exist_ok=True)
    rng, paths = np.random.default_rng(0), []
    for number in range(_NUM_MADE_UP):
        coarse = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        shapes = Image.fromarray(coarse).resize(_SIZE, Image.Resampling.BICUBIC)
        grain = rng.normal(0, 12, (_SIZE[1], _SIZE[0], 3))
        pixels = np.clip(np.asarray(shapes) + grain, 0, 255).astype(np.uint8)
        paths.append(folder / f"made_up_{number}.png")
        Image.fromarray(pixels).save(paths[-1])
    return paths


def shards_of(setting: Setting) -> Path:
    """Write the images as shards, or find those that an earlier stage wrote."""
    folder = setting.work / "shards"
    if folder.exists():
        return folder
    partial = folder.with_name("shards.partial")
    partial.mkdir()
    classes = [f"c{number}" for number in range(_NUM_CLASSES)]
    (partial / CLASSES_FILE).write_text(json.dumps(classes))
    # Again and again, so that an epoch is not over at once.
    rows = _table(encoded_images(setting) * setting.pick(8, tiny=2))
    for index in range(_NUM_SHARDS):
        start, stop = (len(rows) * at // _NUM_SHARDS for at in (index, index + 1))
        write_shard(
            partial / shard_name("set", index=index, num_shards=_NUM_SHARDS),
            rows=rows.slice(start, stop - start),
            rows_per_group=_ROWS_PER_GROUP,
        )
    partial.rename(folder)
    return folder


def _table(images: Sequence[bytes]) -> pa.Table:
    sizes = [_size(image) for image in images]
    columns = {
        "image": list(images),
        "label": [number % _NUM_CLASSES for number in range(len(images))],
        "key": [f"{number:05d}.jpg" for number in range(len(images))],
        "width": [width for width, _ in sizes],
        "height": [height for _, height in sizes],
    }
    return pa.table(columns, schema=SCHEMA)


def rows_of(
    images: Sequence[bytes],
    *,
    sizes: Sequence[tuple[int, int]] | None = None,
    first: int = 0,
) -> Rows:
    """Build rows like a reader's.

    Args:
        sizes: (width, height) of each image; read from their headers by default.
        first: Place of the first in its set.
    """
    found = np.array(sizes or [_size(image) for image in images]).reshape(-1, 2)
    ids = first + np.arange(len(images))
    return Rows(
        views=[np.frombuffer(image, np.uint8) for image in images],
        labels=np.zeros_like(ids),
        ids=ids,
        repeats=np.zeros_like(ids),
        heights=found[:, 1],
        widths=found[:, 0],
        keys=pa.array([f"image {number}" for number in ids]),
    )


def batches_of(images: Sequence[bytes], *, batch_size: int) -> Iterator[list[bytes]]:
    """Yield batches indefinitely, cycling through the images."""
    at = 0
    while True:
        yield [images[(at + number) % len(images)] for number in range(batch_size)]
        at += batch_size


def _size(image: bytes) -> tuple[int, int]:
    return Image.open(io.BytesIO(image)).size
