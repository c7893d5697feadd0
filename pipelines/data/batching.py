"""Turn a worker's share tables into decoded batches, still on the caller's thread.

    share tables -> rows of a batch (views, no copy) -> decoder -> batch

Every worker yields the same number of micro-batches for every global batch, each of
the same shape: what is missing at an epoch's end is filled with rows of weight 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import pyarrow as pa
import torch

from pipelines.data.batch import Batch
from pipelines.data.prefetch import taken_ahead
from pipelines.hardware.device import upload
from pipelines.transforms.decoder import Decoded
from pipelines.transforms.rows import Rows, rows_of

_CELLS = ("epoch", "first_batch", "share_rows", "batch_rows", "ends_epoch")


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Shape of a worker's share of a global batch."""

    share_rows: int
    """Maximum rows of a share: the batch over the workers, rounded up."""
    num_micro: int = 1

    @property
    def micro_rows(self) -> int:
        """Number of rows of every micro-batch."""
        return math.ceil(self.share_rows / self.num_micro)


class RowsDecoder(Protocol):
    """Protocol for decoders of an epoch's rows, all batches of one shape."""

    @property
    def num_ahead(self) -> int:
        """Batches worth starting before the first one is asked for."""
        ...

    def start(self, rows: Rows, epoch: int) -> Callable[[], Decoded]:
        """Start decoding; return a function that waits for the images."""
        ...


def batches(
    tables: Iterable[pa.Table],
    *,
    shape: Shape,
    decode: RowsDecoder,
    device: torch.device,
) -> Iterator[Batch]:
    """Decode share tables into micro-batches of one shape.

    Args:
        decode: makes `shape.micro_rows` images of at most as many rows of an epoch.
    """
    started = _started(tables, shape=shape, decode=decode)
    for decoded, place in taken_ahead(started, num_ahead=decode.num_ahead):
        found = decoded()
        yield Batch(
            images=found.images,
            labels=upload(torch.from_numpy(found.labels), device),
            weights=upload(torch.from_numpy(found.weights), device),
            draw_ids=found.draw_ids,
            num_bad=sum(image.repeat == 0 for image in found.bad),
            **place,
        )


def _started(
    tables: Iterable[pa.Table], *, shape: Shape, decode: RowsDecoder
) -> Iterator[tuple[Callable[[], Decoded], dict[str, Any]]]:
    for table in tables:
        cells: dict[str, Any] = {name: table[name][0].as_py() for name in _CELLS}
        for rows, place in _micro_batches(rows_of(table), shape=shape, cells=cells):
            yield decode.start(rows, cells["epoch"]), place


def _micro_batches(
    rows: Rows, *, shape: Shape, cells: dict[str, Any]
) -> Iterator[tuple[Rows, dict[str, Any]]]:
    """Cut a share table's rows, each with its position in the epoch."""
    first = 0
    for at, num_rows in enumerate(cells["share_rows"]):
        for micro in range(shape.num_micro):
            start = min(micro * shape.micro_rows, num_rows)
            stop = min(start + shape.micro_rows, num_rows)
            yield (
                rows.cut(first + start, first + stop),
                {
                    "epoch": cells["epoch"],
                    "index": cells["first_batch"] + at,
                    "micro": micro,
                    "global_rows": cells["batch_rows"][at],
                    "ends_step": micro == shape.num_micro - 1,
                    "ends_epoch": cells["ends_epoch"]
                    and at == len(cells["share_rows"]) - 1,
                },
            )
        first += num_rows
