"""Read a unit's rows and cut them into the workers' shares, still encoded.

What travels is a *share table* of one row: one worker's part of some consecutive
global batches, the rows of an image set nested in lists. A Ray dataset made of them
deals them out in turn, so each worker gets its own share of every batch, whatever the
number of workers, and an empty share still is a row.

An image's bytes are copied once here, out of the Parquet page into the share.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from pipelines.data.epoch_plan import Slice, Unit, share
from pipelines.data.shard_set import SCHEMA, check_labels
from pipelines.storage.filesystem import open_filesystem
from pipelines.storage.retry import is_remote, retrying
from pipelines.transforms.rows import REPEAT, ROW_ID, image_views, nested

if TYPE_CHECKING:  # read tasks start without torch
    from pipelines.config import PixelSettings

T = TypeVar("T")
# Large enough that Ray's cost for an object vanishes, small enough to wait a little
# for; a single batch may be larger.
MAX_SHARE_BYTES = 16 << 20
FILES_AT_ONCE = 16
"""Shards in a bucket that one read task asks for at a time."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Settings of read tasks beside their unit."""

    address: str
    num_classes: int
    num_workers: int = 1
    decode: PixelSettings | None = None
    """Set where the readers decode, so that pixels travel."""


def read_rows(unit: Unit, *, reading: Reading) -> pa.Table:
    """Read a unit's rows in the order of its slices, with their ids and showings.

    Raises ValueError, naming the shard, where it is gone, damaged or mislabelled, and
    ConnectionError where a store does not answer.
    """
    filesystem, _ = open_filesystem(reading.address)
    by_path = attrgetter("path")
    files = {
        path: list(slices)
        for path, slices in itertools.groupby(sorted(unit.slices, key=by_path), by_path)
    }
    read = functools.partial(_read_file, reading=reading, filesystem=filesystem)
    # A bucket takes its time for each answer, whoever else asks. A disk does not.
    num_threads = FILES_AT_ONCE if is_remote(reading.address) else 1
    with ThreadPoolExecutor(num_threads, thread_name_prefix="read") as pool:
        of_files = pool.map(read, files.keys(), files.values())
        tables = list(itertools.chain.from_iterable(of_files))
    place = {item: at for at, item in enumerate(unit.slices)}
    tables.sort(key=lambda pair: place[pair[0]])
    return pa.concat_tables([table for _, table in tables])


def read_shard(read: Callable[[], T], *, address: str, path: str) -> T:
    """Read from a shard at an address, with retries for a store's passing failures.

    Raises ValueError, naming the shard, where it is gone or damaged, and
    ConnectionError where the store does not answer.
    """
    try:
        return retrying(read, address=address)
    except ConnectionError:  # the store is down, the shard may be whole
        raise
    except (OSError, pa.ArrowInvalid, KeyError) as error:
        raise ValueError(
            f"{path}: expected a whole shard, got one that can't be read ({error}); "
            "write it again with sovit-shards"
        ) from error


def _read_file(
    path: str,
    slices: Sequence[Slice],
    *,
    reading: Reading,
    filesystem: pafs.FileSystem,
) -> list[tuple[Slice, pa.Table]]:
    read = functools.partial(_read_slices, path, slices=slices, filesystem=filesystem)
    of_file = read_shard(read, address=reading.address, path=path)
    for _, table in of_file:
        check_labels(table["label"], num_classes=reading.num_classes, path=path)
    return of_file


def _read_slices(
    path: str, *, slices: Sequence[Slice], filesystem: pafs.FileSystem
) -> list[tuple[Slice, pa.Table]]:
    with pq.ParquetFile(path, filesystem=filesystem, pre_buffer=True) as parquet:
        return [(item, _read_slice(parquet, item)) for item in slices]


def _read_slice(parquet: pq.ParquetFile, item: Slice) -> pa.Table:
    table = parquet.read_row_group(item.place, columns=SCHEMA.names)
    table = table.select(SCHEMA.names)
    # Exchanged since its footer was checked: some of Ray's types unpickle when read.
    if table.schema.types != SCHEMA.types:
        raise pa.ArrowInvalid("its columns are of other types than a shard's")
    rows, showings = item.taken()
    if not item.shown:  # of all rows, in place
        table = table.slice(item.start, item.stop - item.start)
    # 32-bit offsets would overflow where a unit's images pass 2 GiB.
    place = table.schema.get_field_index("image")
    images = table["image"].cast(pa.large_binary())
    table = table.set_column(place, "image", images)
    if item.shown:
        table = table.take(pa.array(rows))
    table = table.append_column(ROW_ID, pa.array(rows + item.first_id, pa.int64()))
    return table.append_column(REPEAT, pa.array(showings, pa.int64()))


def share_tables(unit: Unit, *, reading: Reading) -> Iterator[pa.Table]:
    """Read a unit and yield its share tables: worker 0's, worker 1's, ... in turn."""
    rows = read_rows(unit, reading=reading)
    images = [view for chunk in rows["image"].chunks for view in image_views(chunk)]
    num_bytes = sum(view.nbytes for view in images)
    make_pixels = None
    if reading.decode is not None:
        from pipelines.transforms.decoder import ReaderDecoder

        share_rows = -(-unit.batch_size * unit.num_repeats // reading.num_workers)
        make_pixels = ReaderDecoder(reading.decode, batch_size=share_rows)
        num_bytes = len(images) * make_pixels.bytes_per_image
    rows = rows.drop_columns("image").combine_chunks()
    cut = functools.partial(
        share_table, unit, order=unit.order(), rows=rows, images=images
    )
    first = max(unit.start_batch - unit.first_batch, 0)
    num_shares = unit.num_batches * reading.num_workers
    bytes_per_share = max(num_bytes * unit.num_repeats // num_shares, 1)
    num_batches = max(MAX_SHARE_BYTES // bytes_per_share, 1)
    for start in range(first, unit.num_batches, num_batches):
        batches = range(start, min(start + num_batches, unit.num_batches))
        for worker in range(reading.num_workers):
            table = cut(batches, worker=worker, num_workers=reading.num_workers)
            yield table if make_pixels is None else make_pixels(table)


def share_table(
    unit: Unit,
    batches: Sequence[int],
    *,
    order: np.ndarray,
    rows: pa.Table,
    images: Sequence[np.ndarray],
    worker: int,
    num_workers: int,
) -> pa.Table:
    """Nest one worker's rows of some of a unit's batches into a table of one row.

    Args:
        order: The unit's.
        rows: All rows of the unit, in the order of its slices, without their images.
        images: Those.
    """
    places, repeats, share_rows, batch_rows = [], [], [], []
    for batch in batches:
        begin = batch * unit.batch_size
        batch_order = order[begin : begin + unit.batch_size]
        total = len(batch_order) * unit.num_repeats
        start, stop = share(total, num_parts=num_workers, part=worker)
        places.append(np.tile(batch_order, unit.num_repeats)[start:stop])
        repeats.append(np.arange(start, stop) // max(len(batch_order), 1))
        share_rows.append(stop - start)
        batch_rows.append(total)
    taken = np.concatenate(places)
    table = rows.take(pa.array(taken))
    values = {name: _one_chunk(table[name]) for name in table.column_names}
    # Of a balanced plan a row's showing; with repeated augmentation that is 0.
    repeat = np.concatenate(repeats) + table[REPEAT].to_numpy()
    values[REPEAT] = pa.array(repeat, pa.int64())
    values["image"] = _joined([images[place] for place in taken])
    cells = {
        "epoch": pa.array([unit.epoch]),
        "first_batch": pa.array([unit.first_batch + batches[0]]),
        "ends_epoch": pa.array(
            [unit.ends_epoch and batches[-1] + 1 == unit.num_batches]
        ),
        "share_rows": pa.array([share_rows]),
        "batch_rows": pa.array([batch_rows]),
    }
    return pa.table(cells | {name: nested(found) for name, found in values.items()})


def _one_chunk(column: pa.ChunkedArray) -> pa.Array:
    return pa.concat_arrays(column.chunks)


def _joined(views: Sequence[np.ndarray]) -> pa.Array:
    """Concatenate images to a large_binary array: the one copy of their bytes."""
    offsets = np.zeros(len(views) + 1, np.int64)
    np.cumsum([view.nbytes for view in views], out=offsets[1:])
    content = np.concatenate(views) if views else np.empty(0, np.uint8)
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(content)]
    return pa.Array.from_buffers(pa.large_binary(), len(views), buffers)
