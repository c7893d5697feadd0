"""Format the scoreboard: aligned for a terminal, as Markdown, or as JSON."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from pipelines.results.recipe_rows import Row

_HEADINGS = (
    "recipe",
    "network",
    "pixels",
    "params M",
    "MACs G",
    "published",
    "measured",
    "diff",
    "runs",
)
_NUM_LEFT = 2
"""Columns of words."""
_SMALL = 1e8
_OTHER_MARK = "*"
OTHER_NOTE = f"{_OTHER_MARK} by a run with other settings than the recipe's"


def as_text(rows: Sequence[Row]) -> str:
    """Format one table of all modules, with aligned columns."""
    cells = [_cells(row) for row in rows]
    widths = _widths(cells)
    lines = [_line(_HEADINGS, widths=widths, gap="  ")]
    for module, group in _by_module(rows, cells):
        lines += ["", module]
        lines += [_line(each, widths=widths, gap="  ") for each in group]
    return "\n".join(line.rstrip() for line in [*lines, *_notes(rows)])


def as_markdown(rows: Sequence[Row]) -> str:
    """Format a heading and a table for each module."""
    parts = []
    for module, group in _by_module(rows, [_cells(row) for row in rows]):
        widths = _widths(group)
        rule = [
            "-" * width if at < _NUM_LEFT else "-" * (width - 1) + ":"
            for at, width in enumerate(widths)
        ]
        table = [_HEADINGS, rule, *group]
        lines = (f"| {_line(each, widths=widths, gap=' | ')} |" for each in table)
        parts.append("\n".join([f"## {module}", "", *lines]))
    return "\n\n".join([*parts, *filter(None, _notes(rows))])


def as_json(rows: Sequence[Row]) -> str:
    """Format as JSON with unrounded numbers, and null for unknown values."""
    return json.dumps([_values(row) for row in rows], indent=2)


def _values(row: Row) -> dict[str, Any]:
    size, best = row.size, row.best
    return {
        "recipe": row.run.recipe,
        "module": row.module,
        "network": row.run.model.name,
        "img_size": row.run.model.img_size,
        "num_classes": row.num_classes,
        "num_params": size and size.num_params,
        "num_macs": size and size.num_macs,
        "published_top1": row.run.published_top1,
        "measured_top1": best and best.top1,
        "difference": row.difference,
        "num_runs": best.num_runs if best else 0,
        "run": best and best.name,
        "run_id": best and best.run_id,
        "has_other_settings": best and best.has_other_settings,
    }


def _cells(row: Row) -> tuple[str, ...]:
    size, best, model = row.size, row.best, row.run.model
    mark = _OTHER_MARK if best and best.has_other_settings else ""
    return (
        row.name,
        model.name,
        str(model.img_size),
        f"{size.num_params / 1e6:.2f}" if size else "",
        _giga(size.num_macs) if size else "",
        _number(row.run.published_top1, "{:.2f}".format),
        f"{best.top1:.2f}{mark}" if best else "",
        _number(row.difference, "{:+.2f}".format),
        str(best.num_runs) if best else "",
    )


def _giga(num: int) -> str:
    # The smallest networks are for laptops.
    return f"{num / 1e9:.2f}" if num >= _SMALL else f"{num / 1e9:.4f}"


def _number(value: float | None, text: Callable[[float], str]) -> str:
    return "" if value is None else text(value)


def _widths(cells: Sequence[Sequence[str]]) -> list[int]:
    columns = zip(_HEADINGS, *cells, strict=True)
    return [max(map(len, column)) for column in columns]


def _line(cells: Sequence[str], *, widths: Sequence[int], gap: str) -> str:
    return gap.join(
        cell.ljust(width) if at < _NUM_LEFT else cell.rjust(width)
        for at, (cell, width) in enumerate(zip(cells, widths, strict=True))
    )


def _by_module(
    rows: Sequence[Row], cells: Sequence[Sequence[str]]
) -> Iterator[tuple[str, list[Sequence[str]]]]:
    pairs = zip(rows, cells, strict=True)
    for module, group in itertools.groupby(pairs, key=lambda pair: pair[0].module):
        yield module, [each for _, each in group]


def _notes(rows: Sequence[Row]) -> list[str]:
    is_other = any(row.best and row.best.has_other_settings for row in rows)
    return ["", OTHER_NOTE] if is_other else []
