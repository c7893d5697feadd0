"""Report every undecodable image once: in the log, and in MLflow."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from dataclasses import astuple, dataclass, fields
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the channel starts without torch
    from pipelines.data.epoch_plan import GroupTable
    from pipelines.transforms.rows import BadImage

FILE = "bad_images.csv"


@dataclass(frozen=True, kw_only=True)
class NamedBadImage:
    """Image that could not be decoded: split, shard, key and reason."""

    split: str
    shard: str
    key: str
    reason: str


class BadImageTeller:
    """Reporter of one worker's undecodable images to the driver, each once."""

    def __init__(
        self,
        post: Callable[[NamedBadImage], None],
        *,
        split: str,
        groups: GroupTable,
    ) -> None:
        self._post = post
        self._split = split
        self._groups = groups
        self._told: set[int] = set()

    def __call__(self, bad: tuple[BadImage, ...]) -> None:
        """Post images not reported before."""
        for image in bad:
            if image.row_id in self._told:
                continue
            self._told.add(image.row_id)
            named = NamedBadImage(
                split=self._split,
                shard=self._groups.path_of(image.row_id),
                key=image.key,
                reason=image.reason,
            )
            self._post(named)


class BadImageLog:
    """Table of all workers' undecodable images; repeats after a restart are dropped.

    Args:
        keep: Stores the whole table as text, in MLflow.
        before: The table stored by an earlier part of the run.
    """

    def __init__(self, *, keep: Callable[[str], None], before: str = "") -> None:
        self._keep = keep
        rows = list(csv.reader(io.StringIO(before)))[1:]
        # A dictionary for its order.
        self._rows: dict[tuple[str, ...], None] = {tuple(row): None for row in rows}
        self._num_kept = len(self._rows)

    def add(self, image: NamedBadImage) -> str:
        """Add an image; return the line that names it, "" for a repeat."""
        row = astuple(image)
        if row in self._rows:
            return ""
        self._rows[row] = None
        return (
            f"bad image: {image.key} of {image.shard} ({image.split}), left out: "
            f"{image.reason}"
        )

    def flush(self) -> None:
        """Store the table if it has grown."""
        if len(self._rows) == self._num_kept:
            return
        self._num_kept = len(self._rows)
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(item.name for item in fields(NamedBadImage))
        writer.writerows(self._rows)
        self._keep(text.getvalue())
