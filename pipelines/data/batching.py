"""Turn a worker's share tables into decoded batches, still on the caller's thread.

    share tables -> rows of a batch (views, no copy) -> decoder -> batch

Every worker yields the same number of micro-batches for every global batch, each of
the same shape: what is missing at an epoch's end is filled with rows of weight 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pyarrow as pa
import torch

from pipelines.data.batch import Batch
from pipelines.data.prefetch import taken_ahead
from pipelines.hardware.device import upload
from pipelines.transforms.decoder import Decoded
from pipelines.transforms.rows import Rows, rows_of

_CELLS = ("epoch", "first_batch", "share_rows", "batch_rows", "ends_epoch")


def batches(
    tables: Iterable[pa.Table],
    *,
    num_micro: int,
    micro_rows: int,
    decode: Callable[[Rows, int], Callable[[], Decoded]],
    num_ahead: int = 0,
    device: torch.device,
) -> Iterator[Batch]:
    """Decode share tables into micro-batches of one shape.

    Args:
        num_micro: Micro-batches of a worker's share of a global batch.
        micro_rows: Rows of each.
        decode: Starts decoding at most that many rows of an epoch; what it returns
            waits for the images, `micro_rows` of them.
        num_ahead: Batches worth starting before the first one is asked for.
    """
    started = (
        (decode(rows, place["epoch"]), place)
        for table in tables
        for rows, place in _micro_batches(
            table, num_micro=num_micro, micro_rows=micro_rows
        )
    )
    for decoded, place in taken_ahead(started, num_ahead=num_ahead):
        found = decoded()
        yield Batch(
            images=found.images,
            labels=upload(torch.from_numpy(found.labels), device),
            weights=upload(torch.from_numpy(found.weights), device),
            draw_ids=found.draw_ids,
            num_bad=sum(image.repeat == 0 for image in found.bad),
            **place,
        )


def _micro_batches(
    table: pa.Table, *, num_micro: int, micro_rows: int
) -> Iterator[tuple[Rows, dict[str, Any]]]:
    """Cut a share table into rows, each with their position in the epoch."""
    rows, first = rows_of(table), 0
    cells: dict[str, Any] = {name: table[name][0].as_py() for name in _CELLS}
    for at, num_rows in enumerate(cells["share_rows"]):
        for micro in range(num_micro):
            start = min(micro * micro_rows, num_rows)
            stop = min(start + micro_rows, num_rows)
            yield (
                rows.cut(first + start, first + stop),
                {
                    "epoch": cells["epoch"],
                    "index": cells["first_batch"] + at,
                    "micro": micro,
                    "global_rows": cells["batch_rows"][at],
                    "ends_step": micro == num_micro - 1,
                    "ends_epoch": cells["ends_epoch"]
                    and at == len(cells["share_rows"]) - 1,
                },
            )
        first += num_rows
