"""Write a comparison as an aligned text that fits a terminal, and as CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence

from tuning.compare.columns import NOTHING, Cell, Column
from tuning.compare.rows import Row

_BARS = "▁▂▃▄▅▆▇█"
_NUM_BARS = 12
_MAX_NAME_CHARS = 36
_MAX_VALUE_CHARS = 20
_MAX_PARAMS = 12
_GAP = "  "


def as_text(rows: Sequence[Row], columns: Sequence[Column], *, width: int) -> str:
    """Write an aligned table, with each row's curve, in lines that fit a width.

    Columns that do not fit go on below, with the rows' numbers again. Control
    characters become `?`, since names are foreign text.
    """
    left_out = [column for column in columns if column.is_param][_MAX_PARAMS:]
    shown = [column for column in columns if column not in left_out]
    after_best = [column.name for column in shown].index("best") + 1
    shown.insert(after_best, Column(name="curve", cells=curve_bars(rows)))
    numbers = [str(number) for number in range(1, len(rows) + 1)]
    first = _aligned("#", numbers, is_right=True)
    blocks = [first]
    for column in shown:
        texts = [_shortened(cell.text, column=column) for cell in column.cells]
        lines = _aligned(printable(column.name), texts, is_right=column.is_numeric)
        if len(blocks[-1][0]) + len(_GAP) + len(lines[0]) > width:
            blocks.append(first)
        pairs = zip(blocks[-1], lines, strict=True)
        blocks[-1] = [f"{before}{_GAP}{after}" for before, after in pairs]
    text = "\n\n".join("\n".join(map(str.rstrip, block)) for block in blocks)
    if left_out:
        names = ", ".join(printable(column.name) for column in left_out)
        text += f"\n\nalso different, see --html or --csv: {names}"
    return text


def as_csv(rows: Sequence[Row], columns: Sequence[Column]) -> str:
    """Write whole numbers: means and deviations apart, and the ids of a row's runs."""
    names: list[str] = []
    for column in columns:
        names.append(column.name)
        if any(cell.deviation is not None for cell in column.cells):
            names.append(_deviation(column))
    out = io.StringIO()
    writer = csv.DictWriter(
        out, [*names, "run_ids"], extrasaction="ignore", lineterminator="\n"
    )
    writer.writeheader()
    for at, row in enumerate(rows):
        line: dict[str, object] = {"run_ids": " ".join(row.run_ids)}
        for column in columns:
            cell = column.cells[at]
            line |= {column.name: cell.value, _deviation(column): cell.deviation}
        writer.writerow(line)
    return out.getvalue()


def curve_bars(rows: Sequence[Row]) -> tuple[Cell, ...]:
    """Draw each row's mean curve in at most twelve characters, all on one scale."""
    curves = [
        [point.mean for point in row.mean_curve() if math.isfinite(point.mean)]
        for row in rows
    ]
    values = [value for curve in curves for value in curve]
    low, high = min(values, default=0.0), max(values, default=0.0)

    def draw(curve: Sequence[float]) -> str:
        num = min(len(curve), _NUM_BARS)
        # The last of each of equal parts, so that the end is the end.
        points = [curve[(at + 1) * len(curve) // num - 1] for at in range(num)]
        levels = [(point - low) / ((high - low) or 1) for point in points]
        return "".join(_BARS[round(level * (len(_BARS) - 1))] for level in levels)

    return tuple(Cell(text=draw(curve) if curve else NOTHING) for curve in curves)


def printable(text: str) -> str:
    """Replace what a terminal would act on."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def _deviation(column: Column) -> str:
    return f"{column.name} deviation"


def _shortened(text: str, *, column: Column) -> str:
    limit = _MAX_NAME_CHARS if column.name == "name" else _MAX_VALUE_CHARS
    text = printable(text)
    if len(text) <= limit or not (column.is_param or column.name == "name"):
        return text
    # Names and paths differ at their beginnings and ends.
    num_last = limit // 2
    return f"{text[: limit - num_last - 1]}…{text[-num_last:]}"


def _aligned(heading: str, texts: Sequence[str], *, is_right: bool) -> list[str]:
    lines = [heading, *texts]
    width = max(map(len, lines))
    return [line.rjust(width) if is_right else line.ljust(width) for line in lines]
