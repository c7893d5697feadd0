"""Turn a worker's share tables into decoded batches, still on the caller's thread.

    share tables -> rows of a batch (views, no copy) -> windows -> decoder -> batch

Every worker yields the same number of micro-batches for every global batch, each of
the same shape: what is missing at an epoch's end is filled with rows of weight 0.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from pipelines.config import Data
from pipelines.ingest.augment import Geometry, center_crop, random_resized_crop
from pipelines.ingest.batch import Batch
from pipelines.ingest.reading import ROW_ID


class Decoder(Protocol):
    """Anything that decodes a batch within given windows; see dali, torch_decode."""

    def __call__(self, encoded: list[np.ndarray], geometry: Geometry) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Hold rows of one micro-batch, still encoded; arrays are of shape (n,)."""

    views: list[np.ndarray]
    """uint8 views of the encoded images, in shared memory."""
    labels: np.ndarray
    ids: np.ndarray
    heights: np.ndarray
    widths: np.ndarray
    keys: pa.Array
    """Names of the images, for messages."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Say how a worker's share of a global batch is cut."""

    share_rows: int
    """Rows of a share at most: the batch over the workers, rounded up."""
    num_micro: int = 1

    @property
    def micro_rows(self) -> int:
        """Count the rows of every micro-batch."""
        return math.ceil(self.share_rows / self.num_micro)


def image_views(values: pa.Array) -> list[np.ndarray]:
    """View each element of a large_binary array as uint8, without a copy."""
    if len(values) == 0:  # its buffers may be missing
        return []
    _, offset_buffer, data = values.buffers()
    offsets = np.frombuffer(offset_buffer, np.int64)
    bounds = offsets[values.offset : values.offset + len(values) + 1].tolist()
    content = np.frombuffer(data, np.uint8)
    return [content[start:stop] for start, stop in itertools.pairwise(bounds)]


def rows_of(table: pa.Table) -> Rows:
    """Unnest a share table of one row."""

    def column(name: str) -> pa.Array:
        return table[name].chunk(0).flatten()

    def numbers(name: str) -> np.ndarray:
        return column(name).to_numpy().astype(np.int64)

    return Rows(
        views=image_views(column("image")),
        labels=numbers("label"),
        ids=numbers(ROW_ID),
        heights=numbers("height"),
        widths=numbers("width"),
        keys=column("key"),
    )


def cut(rows: Rows, *, start: int, stop: int) -> Rows:
    """Take some of the rows."""
    return Rows(
        views=rows.views[start:stop],
        labels=rows.labels[start:stop],
        ids=rows.ids[start:stop],
        heights=rows.heights[start:stop],
        widths=rows.widths[start:stop],
        keys=rows.keys[start:stop],
    )


def geometry_of(
    rows: Rows, *, data: Data, img_size: int, seed: int, epoch: int, train: bool
) -> Geometry:
    """Work out the windows of some rows, drawn for training, fixed for evaluation."""
    if not train:
        return center_crop(
            heights=rows.heights,
            widths=rows.widths,
            img_size=img_size,
            crop_pct=data.crop_pct,
        )
    return random_resized_crop(
        rows.ids,
        heights=rows.heights,
        widths=rows.widths,
        seed=seed,
        epoch=epoch,
        img_size=img_size,
        scale=data.crop_scale,
        ratio=data.crop_ratio,
        hflip=data.hflip,
    )


def batches(
    tables: Iterable[pa.Table],
    *,
    shape: Shape,
    decode: Callable[[Rows, int], Tensor],
    device: torch.device,
) -> Iterator[Batch]:
    """Decode share tables into micro-batches of one shape.

    Args:
        decode: makes float32 (n, 3, H, W) of n rows of an epoch.
    """
    blank: Tensor | None = None
    for table in tables:
        rows = rows_of(table)
        cells = {
            name: table[name][0].as_py()
            for name in (
                "epoch",
                "first_batch",
                "share_rows",
                "batch_rows",
                "ends_epoch",
            )
        }
        start = 0
        for at, num_rows in enumerate(cells["share_rows"]):
            for micro in range(shape.num_micro):
                begin = min(micro * shape.micro_rows, num_rows)
                stop = min(begin + shape.micro_rows, num_rows)
                part = cut(rows, start=start + begin, stop=start + stop)
                images = decode(part, cells["epoch"]) if part.views else None
                if images is not None:
                    blank = images[:1]
                yield _batch(
                    _fill(images, blank=blank, num_rows=shape.micro_rows),
                    labels=part.labels,
                    device=device,
                    epoch=cells["epoch"],
                    index=cells["first_batch"] + at,
                    micro=micro,
                    global_rows=cells["batch_rows"][at],
                    ends_step=micro == shape.num_micro - 1,
                    ends_epoch=cells["ends_epoch"]
                    and at == len(cells["share_rows"]) - 1,
                )
            start += num_rows


def _fill(images: Tensor | None, *, blank: Tensor | None, num_rows: int) -> Tensor:
    """Repeat rows until the shape is full: real pixels keep BatchNorm's statistics."""
    source = images if images is not None else blank
    if source is None:
        raise ValueError(
            "wanted an image for every worker in the first batch, came none; "
            "use fewer workers than images"
        )
    if len(source) == num_rows:
        return source
    places = torch.arange(num_rows, device=source.device) % len(source)
    return source[places]


def _batch(
    images: Tensor, *, labels: np.ndarray, device: torch.device, **place: int | bool
) -> Batch:
    num_rows = len(images)
    # A filling row is a copy of a real one, label included, so that mixing with it
    # mixes in what it shows.
    padded = np.resize(labels, num_rows) if len(labels) else np.zeros(num_rows, int)
    weights = (np.arange(num_rows) < len(labels)).astype(np.float32)
    return Batch(
        images=images,
        labels=torch.from_numpy(padded).to(device, non_blocking=True),
        weights=torch.from_numpy(weights).to(device, non_blocking=True),
        **place,  # type: ignore[arg-type]
    )
