"""Read the rows of one file of a token set: read tasks start here, without torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa

from pipelines.data.epoch_plan import Unit
from pipelines.data.reading import Reading, read_rows
from pipelines.transforms.rows import nested

SPLIT, VIEW, INDEX = "split", "view", "index"


@dataclass(frozen=True, kw_only=True)
class Part:
    """Rows of one file of a set, and the view it shows."""

    split: str
    view: int
    index: int
    unit: Unit


def read_part(part: Part, *, reading: Reading) -> Iterator[pa.Table]:
    """Read a part's encoded rows, and yield them nested in a table of one row.

    Ray never splits a row. Raises as `read_rows`.
    """
    rows = read_rows(part.unit, reading=reading)
    columns = {
        name: nested(pa.concat_arrays(rows[name].chunks)) for name in rows.column_names
    }
    name = {SPLIT: [part.split], VIEW: [part.view], INDEX: [part.index]}
    yield pa.table(name | columns)
