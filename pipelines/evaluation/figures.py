"""Write what an evaluation found as tables and pictures, in the driver: no torch."""

from __future__ import annotations

import csv
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.evaluation.report import Confusions, Report, Worst
from pipelines.events.channel import Figure

ARTIFACT_FOLDER = "validation"
PER_CLASS_FILE = "per_class.csv"
CONFUSION_FILE = "confusion.png"
WORST_FILE = "worst.png"
WORST_TABLE_FILE = "worst.csv"
MAX_NAMED = 50
"""Most classes whose names fit the sides of a matrix; more are binned into cells."""
_MAX_WITH_NUMBERS = 20
_MAX_CELLS = 100
_NUM_PAIRS = 20
_NUM_CONFUSED = 3
_NAME_CHARS = 24
_KEY_CHARS = 30
_TITLE_CHARS = 120
_COLUMNS = 8
_DOTS_PER_INCH = 110
_COLORS = "YlGnBu"


def pictured(reports: Mapping[str, Report], *, title: str) -> Figure:
    """Build what the driver logs to MLflow: a folder for each set, by its prefix.

    Each evaluation's files replace those of the one before, so that they do not pile up
    in a long run; the title says which it was.
    """
    draw = partial(write_reports, dict(reports), title=title)
    return Figure(draw=draw, path=ARTIFACT_FOLDER)


def write_reports(reports: Mapping[str, Report], folder: Path, *, title: str) -> None:
    """Write each set's report into a folder of its name."""
    for name, report in reports.items():
        write_report(report, folder / name, title=f"{title}, {name}")


def write_report(report: Report, folder: Path, *, title: str) -> None:
    """Write a set's report into a folder, which is made if it is not there.

    A table of the classes; a picture of which is taken for which, if they are few
    enough to be counted in pairs; and a table and a picture of the worst images, if any
    were kept.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_per_class(report.confusions, folder / PER_CLASS_FILE)
    if report.confusions.pairs is not None:
        draw_confusions(report.confusions, folder / CONFUSION_FILE, title=title)
    if len(report.worst):
        classes = report.confusions.classes
        write_worst(report.worst, folder / WORST_TABLE_FILE, classes=classes)
        draw_worst(report.worst, folder / WORST_FILE, classes=classes, title=title)


def write_per_class(found: Confusions, path: Path) -> None:
    """Write a line a class: images, top-1 in percent, what it is mostly taken for."""
    confused: dict[int, list[str]] = defaultdict(list)
    for label, prediction, num in [] if found.pairs is None else found.pairs.tolist():
        if len(confused[label]) < _NUM_CONFUSED:
            confused[label].append(f"{found.classes[prediction]}: {num}")
    rows = (
        (
            name,
            num,
            right,
            f"{100 * right / num:.2f}" if num else "",
            "; ".join(confused[at]),
        )
        for at, (name, num, right) in enumerate(
            zip(
                found.classes,
                found.num_images.tolist(),
                found.num_right.tolist(),
                strict=True,
            )
        )
    )
    _write_table(path, ("class", "images", "right", "top1", "taken_for"), rows)


def write_worst(found: Worst, path: Path, *, classes: Sequence[str]) -> None:
    """Write a line an image, the worst first, from which names can be copied."""
    rows = (
        (
            found.name_of(at),
            int(found.row_ids[at]),
            classes[found.labels[at]],
            classes[found.predictions[at]],
            f"{found.probabilities[at]:.4f}",
            f"{found.losses[at]:.4f}",
        )
        for at in range(len(found))
    )
    names = ("key", "row", "label", "prediction", "probability", "loss")
    _write_table(path, names, rows)


def _write_table(
    path: Path, names: Sequence[str], rows: Iterable[Sequence[object]]
) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(names)
        writer.writerows(rows)


def draw_confusions(found: Confusions, path: Path, *, title: str) -> None:
    """Draw as a PNG which classes are taken for which.

    Of few classes all pairs; of many cells of neighbours, and the pairs that are
    confused most often by name.
    """
    num_images = int(found.num_images.sum())
    title = f"{title}: top-1 {found.top1:.2f} % of {num_images:,} images"
    if len(found.classes) <= MAX_NAMED:
        figure = _draw_named(found, title=title)
    else:
        figure = _draw_many(found, title=title)
    figure.savefig(path, dpi=_DOTS_PER_INCH, format="png")


def _draw_named(found: Confusions, *, title: str) -> Any:
    from matplotlib.colors import PowerNorm

    num = len(found.classes)
    side = 3.2 + max(0.26, 0.5 - 0.01 * num) * num
    figure, (place,) = _figure(side + 0.6, side, title=title)
    shares = 100 * found.matrix() / np.maximum(found.num_images, 1)[:, None]
    # The square root keeps a confusion of 2 % visible beside 90 % on the diagonal.
    norm = PowerNorm(0.5, vmin=0, vmax=100)
    image = place.imshow(shares, cmap=_COLORS, norm=norm)
    figure.colorbar(image, ax=place, label="% of the class's images", shrink=0.8)
    names = [_short(name, _NAME_CHARS) for name in found.classes]
    size = 9 if num <= _MAX_WITH_NUMBERS else 7
    place.set_xticks(range(num), names, rotation=90, fontsize=size)
    place.set_yticks(range(num), names, fontsize=size)
    place.set_xlabel("predicted")
    place.set_ylabel("label")
    if num <= _MAX_WITH_NUMBERS:
        for (row, column), share in np.ndenumerate(shares):
            if share >= 0.05:
                color = "white" if share > 35 else "black"
                text = f"{share:.1f}" if share < 99.95 else "100"
                place.text(
                    column, row, text, ha="center", va="center", color=color, fontsize=7
                )
    return figure


def _draw_many(found: Confusions, *, title: str) -> Any:
    from matplotlib.colors import LogNorm

    assert found.pairs is not None
    figure, (left, right) = _figure(13.5, 6.4, title=title, num_places=2)
    cells, width = binned(found.matrix())
    norm = LogNorm(vmin=1, vmax=max(int(cells.max()), 2))
    shown = np.ma.masked_equal(cells, 0)
    size = width * len(cells)
    image = left.imshow(shown, cmap=_COLORS, norm=norm, extent=(0, size, size, 0))
    figure.colorbar(image, ax=left, label="images", shrink=0.8)
    left.set_xlabel(f"predicted class, {width} to a cell")
    left.set_ylabel("label")
    worst = found.pairs[:_NUM_PAIRS]
    names = [
        f"{_short(found.classes[label], _NAME_CHARS)} → "
        f"{_short(found.classes[prediction], _NAME_CHARS)}"
        for label, prediction, _ in worst.tolist()
    ]
    places = range(len(worst))
    right.barh(places, worst[:, 2], color="tab:blue")
    right.set_yticks(places, names, fontsize=8)
    right.invert_yaxis()
    right.xaxis.get_major_locator().set_params(integer=True)
    right.set_xlabel("images taken for another class, the pairs that occur most often")
    return figure


def binned(matrix: np.ndarray) -> tuple[np.ndarray, int]:
    """Add up cells of neighbouring classes to at most 100 a side.

    Returns the sums, int64 (n, n), and how many classes a cell spans.
    """
    width = math.ceil(len(matrix) / _MAX_CELLS)
    missing = -len(matrix) % width
    padded = np.pad(matrix, (0, missing))
    num = len(padded) // width
    return padded.reshape(num, width, num, width).sum(axis=(1, 3)), width


def draw_worst(found: Worst, path: Path, *, classes: Sequence[str], title: str) -> None:
    """Draw the worst images as a PNG: label, prediction with its probability, key."""
    num_columns = min(_COLUMNS, len(found))
    num_rows = math.ceil(len(found) / num_columns)
    title = f"{title}: the {len(found)} images of the highest loss"
    figure, (place,) = _figure(1.55 * num_columns, 2.1 * num_rows + 0.4, title=title)
    place.set_axis_off()
    for at in range(len(found)):
        row, column = divmod(at, num_columns)
        # In units of a picture's side, downwards; text stands below it.
        x, y = 1.1 * column, 1.5 * row
        place.imshow(
            found.pixels[at], extent=(x, x + 1, y + 1, y), interpolation="nearest"
        )
        label = _short(classes[int(found.labels[at])], _NAME_CHARS)
        prediction = _short(classes[int(found.predictions[at])], _NAME_CHARS - 5)
        # A path's end says more than its beginning.
        key = _short(found.name_of(at)[-_KEY_CHARS:], _KEY_CHARS)
        lines = (
            ("black", label),
            ("crimson", f"{prediction} {found.probabilities[at]:.2f}"),
            ("0.5", key),
        )
        for line, (color, text) in enumerate(lines):
            size = 6.5 if line < 2 else 5
            place.text(
                x, y + 1.03 + 0.13 * line, text, color=color, fontsize=size, va="top"
            )
    place.set_xlim(0, 1.1 * num_columns)
    place.set_ylim(1.5 * num_rows, 0)
    figure.savefig(path, dpi=_DOTS_PER_INCH, format="png")


def _figure(
    width: float, height: float, *, title: str, num_places: int = 1
) -> tuple[Any, list[Any]]:
    """Begin a figure; sizes in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(_short(title, _TITLE_CHARS), fontsize=10)
    places = figure.subplots(1, num_places, squeeze=False)[0]
    return figure, list(places)


def _short(name: str, num_chars: int) -> str:
    short = name if len(name) <= num_chars else f"{name[: num_chars - 1]}…"
    return short.replace("$", r"\$")  # matplotlib would set a formula
