"""Read a unit's rows and cut them into the workers' shares, still encoded.

What travels is a *share table* of one row: one worker's part of some consecutive
global batches, the rows of an image set nested in lists. A Ray dataset made of them
deals them out in turn, so each worker gets its own share of every batch, whatever the
number of workers, and an empty share still is a row.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from operator import attrgetter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.ingest.footers import check_labels, open_place
from pipelines.ingest.plan import Slice, Unit, share
from pipelines.shards.format import SCHEMA

# Large enough that Ray's cost for an object vanishes, small enough to wait a little
# for; a single batch may be larger.
_MAX_SHARE_BYTES = 16 << 20
ROW_ID = "row_id"


def read_rows(unit: Unit, *, address: str, num_classes: int) -> pa.Table:
    """Read a unit's rows in training order, with their ids in a column `row_id`.

    Raises ValueError, naming the shard, where it is gone, damaged or mislabelled.
    """
    filesystem, _ = open_place(address)
    tables: list[tuple[Slice, pa.Table]] = []
    by_path = attrgetter("path")
    for path, slices in itertools.groupby(sorted(unit.slices, key=by_path), by_path):
        try:
            with pq.ParquetFile(path, filesystem=filesystem) as parquet:
                of_file = [(item, _read_slice(parquet, item)) for item in slices]
        except (OSError, pa.ArrowInvalid, KeyError) as error:
            raise ValueError(
                f"{path}: wanted a whole shard, came one that can't be read ({error}); "
                "write it again with sovit-shards"
            ) from error
        for _, table in of_file:
            check_labels(table["label"], num_classes=num_classes, path=path)
        tables += of_file
    place = {item: at for at, item in enumerate(unit.slices)}
    tables.sort(key=lambda pair: place[pair[0]])
    rows = pa.concat_tables([table for _, table in tables]).combine_chunks()
    return rows.take(pa.array(unit.order()))


def _read_slice(parquet: pq.ParquetFile, item: Slice) -> pa.Table:
    table = parquet.read_row_group(item.place, columns=SCHEMA.names)
    table = table.select(SCHEMA.names)
    table = table.slice(item.start, item.stop - item.start)
    # 32-bit offsets would overflow where a unit's images pass 2 GiB.
    place = table.schema.get_field_index("image")
    images = table["image"].cast(pa.large_binary())
    table = table.set_column(place, "image", images)
    ids = np.arange(item.start, item.stop) + item.first_id
    return table.append_column(ROW_ID, pa.array(ids, pa.int64()))


def share_tables(
    unit: Unit, *, address: str, num_classes: int, num_workers: int
) -> Iterator[pa.Table]:
    """Read a unit and yield its share tables: worker 0's, worker 1's, ... in turn."""
    rows = read_rows(unit, address=address, num_classes=num_classes)
    first = max(unit.start_batch - unit.first_batch, 0)
    bytes_per_share = max(rows.nbytes // unit.num_batches // num_workers, 1)
    num_batches = max(_MAX_SHARE_BYTES // bytes_per_share, 1)
    for start in range(first, unit.num_batches, num_batches):
        stop = min(start + num_batches, unit.num_batches)
        for worker in range(num_workers):
            yield _share_table(
                unit,
                rows=rows,
                batches=range(start, stop),
                worker=worker,
                num_workers=num_workers,
            )


def _share_table(
    unit: Unit, *, rows: pa.Table, batches: Sequence[int], worker: int, num_workers: int
) -> pa.Table:
    """Nest one worker's rows of some batches into a table of one row."""
    bounds, batch_rows = [], []
    for batch in batches:
        begin = batch * unit.batch_size
        num_rows = min(unit.batch_size, unit.num_rows - begin)
        start, stop = share(num_rows, num_parts=num_workers, part=worker)
        bounds.append((begin + start, begin + stop))
        batch_rows.append(num_rows)
    taken = rows.take(pa.array(np.concatenate([np.arange(*pair) for pair in bounds])))
    columns: dict[str, pa.Array] = {
        "epoch": pa.array([unit.epoch]),
        "first_batch": pa.array([unit.first_batch + batches[0]]),
        "ends_epoch": pa.array(
            [unit.ends_epoch and batches[-1] + 1 == unit.num_batches]
        ),
        "share_rows": pa.array([[stop - start for start, stop in bounds]]),
        "batch_rows": pa.array([batch_rows]),
    }
    for name in taken.column_names:
        values = pa.concat_arrays(taken[name].chunks)
        columns[name] = pa.ListArray.from_arrays(
            pa.array([0, len(values)], pa.int32()), values
        )
    return pa.table(columns)
