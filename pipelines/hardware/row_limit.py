"""Limit of the rows that a pass takes, found by running out of memory.

A batch that does not fit is cut into more parts; what is computed of it stays the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass


def ignore_lowered(line: str, max_rows: int) -> None:
    """Ignore that a limit was lowered."""


@dataclass(kw_only=True)
class RowLimit:
    """Maximum rows of one pass on one device; lowered when memory runs out."""

    max_rows: int = 0
    """0 until memory runs out: batches pass as they come."""
    on_lowered: Callable[[str, int], None] = ignore_lowered
    """Called with a line for the user and the new limit, before it is used."""

    def num_parts(self, num_rows: int) -> int:
        """Number of parts that a batch is cut into, so that each fits."""
        return math.ceil(num_rows / self.max_rows) if self.max_rows else 1

    def lower(self, num_rows: int, *, doing: str, advice: str, note: str = "") -> None:
        """Halve the rows of a pass, after a batch of `num_rows` ran out of memory.

        Args:
            doing: What ran out of memory: training or evaluation.
            advice: What to set where even one image does not fit.
            note: Appended to the line for the user.

        Raises ValueError where the pass had one row.
        """
        failed = math.ceil(num_rows / self.num_parts(num_rows))
        if failed == 1:
            raise ValueError(
                f"expected memory for 1 image at a time in {doing}, got out of memory; "
                f"{advice}"
            )
        lowered = math.ceil(failed / 2)
        num_parts = math.ceil(num_rows / lowered)
        rows = math.ceil(num_rows / num_parts)
        line = (
            f"{doing} ran out of memory with {failed} images at a time: "
            f"{num_parts} x {rows} from here{note}"
        )
        self.on_lowered(line, rows)
        self.max_rows = rows
