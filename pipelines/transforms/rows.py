"""Unpack the rows of a worker's share tables, their bytes as views."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

ROW_ID, REPEAT = "row_id", "repeat"
DRAW_STRIDE = 1 << 40
"""A draw id is repeat * DRAW_STRIDE + row id: no set has so many rows."""
PIXELS, REASON = "pixels", "reason"


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Rows of one micro-batch; arrays are of shape (n,)."""

    views: list[np.ndarray]
    """uint8 views, in shared memory, of the encoded images or of decoded pixels."""
    labels: np.ndarray
    ids: np.ndarray
    """Places of the rows in the set."""
    repeats: np.ndarray
    """Index of the repetition, or of the showing in a balanced epoch."""
    heights: np.ndarray
    widths: np.ndarray
    keys: pa.Array
    """Names of the images, for messages."""
    reasons: pa.Array | None = None
    """Where the readers decoded: why an image could not be, "" where it could."""

    def __len__(self) -> int:
        return len(self.ids)

    def cut(self, start: int, stop: int) -> Rows:
        """Return some of the rows."""
        part = slice(start, stop)
        return Rows(
            views=self.views[part],
            labels=self.labels[part],
            ids=self.ids[part],
            repeats=self.repeats[part],
            heights=self.heights[part],
            widths=self.widths[part],
            keys=self.keys[part],
            reasons=None if self.reasons is None else self.reasons[part],
        )


@dataclass(frozen=True, kw_only=True)
class BadImage:
    """Image that could not be decoded."""

    row_id: int
    """Place of its row in the set."""
    key: str
    reason: str
    repeat: int = 0
    """Index of the repetition, or of the showing in a balanced epoch."""


def image_views(values: pa.Array) -> list[np.ndarray]:
    """View each element of a large_binary array as uint8, without a copy."""
    if len(values) == 0:  # its buffers may be missing
        return []
    _, offset_buffer, data = values.buffers()
    offsets = np.frombuffer(offset_buffer, np.int64)
    bounds = offsets[values.offset : values.offset + len(values) + 1].tolist()
    # Where every element is empty there may be no buffer at all.
    content = np.frombuffer(data, np.uint8) if data else np.empty(0, np.uint8)
    return [content[start:stop] for start, stop in itertools.pairwise(bounds)]


def nested(values: pa.Array) -> pa.ListArray:
    """Make a column of one row that holds all values."""
    return pa.ListArray.from_arrays(pa.array([0, len(values)], pa.int32()), values)


def rows_of(table: pa.Table) -> Rows:
    """Unnest a share table of one row."""

    def column(name: str) -> pa.Array:
        return table[name].chunk(0).flatten()

    def numbers(name: str) -> np.ndarray:
        return column(name).to_numpy().astype(np.int64)

    decoded = PIXELS in table.column_names
    return Rows(
        views=image_views(column(PIXELS if decoded else "image")),
        labels=numbers("label"),
        ids=numbers(ROW_ID),
        repeats=numbers(REPEAT),
        heights=numbers("height"),
        widths=numbers("width"),
        keys=column("key"),
        reasons=column(REASON) if decoded else None,
    )
