"""Token sets: a backbone's outputs for one split's images, stored for training heads.

A folder of Parquet files `view-00-00003-of-00016.parquet` with the columns of
`schema`, and `tokens.json`, which is written last: a folder without it is not finished.
View 0 shows the images as evaluation sees them, further ones as training does.

Tokens are float16, an image's in one binary value: as a list of numbers, Parquet would
keep levels and an encoding for each of them. They are incompressible, so nothing
is compressed; the operating system then keeps one copy of a file for all processes that
read it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
from types import MappingProxyType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from pipelines.data.epoch_plan import GroupTable, Slice, Unit, plan_epoch
from pipelines.data.shard_set import write_json
from pipelines.storage.path import StoragePath
from pipelines.storage.retry import answering, retrying
from pipelines.transforms.rows import ROW_ID

TOKENS_FILE = "tokens.json"
BYTES_PER_TOKEN_VALUE = 2
_BYTES_PER_GROUP = 4 << 20
_MAX_ROWS_PER_GROUP = 1024
_MIB = 1 << 20
_TUPLES = ("shape", "classes", "views")


def part_name(*, view: int, index: int, num_parts: int) -> str:
    """Return the name of one file of a set."""
    return f"view-{view:02d}-{index:05d}-of-{num_parts:05d}.parquet"


def schema(shape: Sequence[int]) -> pa.Schema:
    """Return the Arrow schema of a file whose tokens have a given shape."""
    return pa.schema(
        [
            ("tokens", pa.binary(bytes_per_image(shape))),
            ("label", pa.int64()),
            ("key", pa.string()),
            (ROW_ID, pa.int64()),  # the image's place in the shard set
        ]
    )


def bytes_per_image(shape: Sequence[int]) -> int:
    """Return the size of an image's tokens in bytes."""
    return math.prod(shape) * BYTES_PER_TOKEN_VALUE


def write_part(
    file: StoragePath,
    *,
    rows: pa.Table,
    shape: Sequence[int],
    rows_per_group: int = _MAX_ROWS_PER_GROUP,
    metadata: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Write a file atomically."""
    most = max(_BYTES_PER_GROUP // bytes_per_image(shape), 1)
    with file.writing() as path:
        pq.write_table(
            rows.replace_schema_metadata(dict(metadata)),
            path,
            row_group_size=min(most, rows_per_group),
            compression="none",
            use_dictionary=False,
            write_statistics=False,
        )


@dataclass(frozen=True, kw_only=True)
class TokenSet:
    """Metadata of a finished token set; the tokens stay in their files."""

    place: StoragePath
    shape: tuple[int, ...]
    """Shape of the backbone's output for one image: (N, D) tokens, or a map."""
    classes: tuple[str, ...]
    num_images: int
    """Images of one view."""
    num_bad: int
    """Images left out of a view, since they can't be decoded."""
    made_of: dict[str, Any]
    """What the tokens depend on: data, weights, pixels' settings."""
    views: tuple[dict[str, list[int]], ...]
    """For each view, the row counts of the row groups by file name."""

    @classmethod
    def open(cls, place: str | StoragePath) -> TokenSet:
        """Open a folder's token set; ValueError where there is no finished one."""
        place = place if isinstance(place, StoragePath) else StoragePath(place)
        file = place.within(TOKENS_FILE)
        try:
            with answering():
                raw = json.loads(file.read())
            tuples = {name: tuple(raw.pop(name)) for name in _TUPLES}
            return cls(place=place, **tuples, **raw)
        except FileNotFoundError as error:
            raise ValueError(
                f"expected a finished token set, got {str(place)!r} without "
                f"{TOKENS_FILE}; write it with write_tokens, which goes on where it "
                "was stopped"
            ) from error
        except (TypeError, KeyError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(
                f"{file}: expected what write_tokens writes, got {error!r}; delete the "
                "folder and write it again"
            ) from error

    def save(self) -> None:
        """Write `tokens.json`, which marks the set as finished."""
        raw = {name: value for name, value in vars(self).items() if name != "place"}
        write_json(self.place.within(TOKENS_FILE), value=raw)

    @property
    def num_views(self) -> int:
        """Number of views of every image."""
        return len(self.views)

    @property
    def num_bytes(self) -> int:
        """Size of one view's tokens in bytes."""
        return self.num_images * bytes_per_image(self.shape)

    def groups(self, view: int) -> GroupTable:
        """Return the row groups of a view, for `plan_epoch`."""
        files = self.views[view]
        paths = tuple(sorted(files))
        return GroupTable(
            paths=paths,
            num_groups=np.array([len(files[path]) for path in paths], np.int32),
            num_rows=np.array([n for path in paths for n in files[path]], np.int32),
        )


@dataclass(frozen=True, kw_only=True)
class _Part:
    tokens: Tensor
    """float16 (n, *shape)."""
    labels: Tensor


class TokenReader:
    """Reader of a token set, batch by batch in a seeded order.

    Sets up to `max_held_mb` are read once and held; of larger ones the row groups are
    read anew in every epoch, in a seeded order, and shuffled among each other within
    `unit_mb`, while the unit before is trained on. Both give the same batches.
    """

    def __init__(
        self, tokens: TokenSet, *, max_held_mb: float = 1024, unit_mb: float = 256
    ) -> None:
        self._set = tokens
        self._is_held = tokens.num_bytes * tokens.num_views <= max_held_mb * _MIB
        self._held: dict[int, _Part] = {}
        self._unit_rows = max(int(unit_mb * _MIB) // bytes_per_image(tokens.shape), 1)

    def epoch(
        self, epoch: int, *, batch_size: int, seed: int = 0, shuffle: bool = True
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield an epoch's batches: float16 tokens (B, *shape) and int64 labels (B,).

        Every image comes once, in view `epoch` modulo their number.

        Raises ValueError, naming the file, where one is gone or damaged.
        """
        view = epoch % self._set.num_views
        groups = self._set.groups(view)
        plan = plan_epoch(
            groups,
            batch_size=batch_size,
            # No unit is larger than the set: its order would be the set's all the same.
            shuffle_rows=min(self._unit_rows, groups.total_rows),
            seed=seed,
            epoch=epoch,
            shuffle=shuffle,
        )
        for unit, part, places in self._parts(view, plan.units()):
            order = torch.from_numpy(places[unit.order()])
            for chosen in order.split(batch_size):
                yield part.tokens[chosen], part.labels[chosen]

    def _parts(
        self, view: int, units: Iterator[Unit]
    ) -> Iterator[tuple[Unit, _Part, np.ndarray]]:
        """Yield each unit, a part that has its rows, and the rows' positions in it."""
        if self._is_held:
            if view not in self._held:
                groups = self._set.groups(view)
                whole = range(len(groups.num_rows))
                self._held[view] = self._read([groups.slice_of(at) for at in whole])
            for unit in units:
                yield unit, self._held[view], _row_ids(unit.slices)
            return
        with ThreadPoolExecutor(1) as pool:
            later = None
            for unit in units:
                now, later = later, (unit, pool.submit(self._read, unit.slices))
                if now is not None:
                    yield now[0], now[1].result(), np.arange(now[0].num_rows)
            if later is not None:
                yield later[0], later[1].result(), np.arange(later[0].num_rows)

    def _read(self, slices: Sequence[Slice]) -> _Part:
        """Read slices, in their order."""
        num_rows = [item.stop - item.start for item in slices]
        starts = dict(zip(slices, np.cumsum([0, *num_rows[:-1]]), strict=True))
        size = bytes_per_image(self._set.shape)
        content = np.empty((sum(num_rows), size), np.uint8)
        labels = np.empty(sum(num_rows), np.int64)
        by_path = attrgetter("path")
        for path, of_file in groupby(sorted(slices, key=by_path), by_path):
            for item, table in self._read_file(path, list(of_file)):
                begin = int(starts[item])
                end = begin + item.stop - item.start
                content[begin:end] = _content(table["tokens"], size=size)
                labels[begin:end] = table["label"].to_numpy()
        shape = (-1, *self._set.shape)
        tokens = torch.from_numpy(content.view(np.float16).reshape(shape))
        return _Part(tokens=tokens, labels=torch.from_numpy(labels))

    def _read_file(
        self, path: str, slices: Sequence[Slice]
    ) -> list[tuple[Slice, pa.Table]]:
        file = self._set.place.within(path)

        def read() -> list[tuple[Slice, pa.Table]]:
            filesystem, inner = file.open()
            with pq.ParquetFile(inner, filesystem=filesystem) as parquet:
                return [(item, _read_slice(parquet, item)) for item in slices]

        try:
            with answering():
                return retrying(read, address=str(file))
        except (OSError, pa.ArrowInvalid, KeyError) as error:
            raise ValueError(
                f"{file}: expected a whole file of tokens, got one that can't be read "
                f"({error}); delete the folder and write the tokens again"
            ) from error


def _read_slice(parquet: pq.ParquetFile, item: Slice) -> pa.Table:
    table = parquet.read_row_group(item.place, columns=["tokens", "label"])
    return table.slice(item.start, item.stop - item.start)


def _row_ids(slices: Sequence[Slice]) -> np.ndarray:
    ids = [np.arange(s.first_id + s.start, s.first_id + s.stop) for s in slices]
    return np.concatenate(ids)


def _content(column: pa.ChunkedArray, *, size: int) -> np.ndarray:
    """View fixed-size binary values as uint8 (n, size)."""
    chunks = []
    for chunk in column.chunks:
        _, data = chunk.buffers()
        values = np.frombuffer(data, np.uint8).reshape(-1, size)
        chunks.append(values[chunk.offset : chunk.offset + len(chunk)])
    return np.concatenate(chunks)
