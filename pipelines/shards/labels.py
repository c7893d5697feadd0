"""Read the labels of images that come without classes; reject ambiguous ones."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import pyarrow.fs as pafs

from pipelines.shards.classes import (
    MAX_OWN_LABELS,
    Numbering,
    label_text,
    plain,
    refuse_captions,
    resolve_names,
    resolve_texts,
)
from pipelines.shards.devkit import (
    GROUND_TRUTH,
    ids_beside,
    is_devkit,
    open_devkit,
    read_ground_truth,
    read_ids,
)
from pipelines.shards.listing import Builder, Listing
from pipelines.shards.stored import base_name, child, read_text
from pipelines.shards.suffixes import is_picture_name
from pipelines.storage.path import StoragePath

_LABEL_COLUMNS = ("label", "class", "category", "target", "predictionstring")
# Kaggle's LOC_val_solution.csv: a class and a box, as often as there are boxes.
_BOXES = re.compile(r"(n\d{8})( \d+){4}( n\d{8}( \d+){4})* ?")
Rows = list[list[str]]


@dataclass(frozen=True)
class LabelFile:
    """Text of labels that a user names, and how it is read.

    Attributes:
        address: A text, a table, the devkit (packed or not) or its folder.
        synsets: What maps a devkit's ids to class names, see `devkit.read_ids`.
        column: Name of the label's column, or its number counted from 1.
    """

    address: str
    synsets: str | None = None
    column: str | None = None


@dataclass
class _Labels:
    """Labels by image, in the order of the images; None where there is none."""

    texts: list[str | None]
    notes: list[str] = field(default_factory=list)


def label_by_file(
    builder: Builder, file: LabelFile, *, numbering: Numbering
) -> Listing:
    """Label images by a text: one label a line in their order, or with their names.

    Lines with names come as `NAME,LABEL` (a CSV, with or without column names), with a
    tab between, or with blanks; or as a JSON object. A name is an image's path in the
    source, or its file name where that occurs once, with or without suffix. A label is
    a class name, a number of a class, or, with the devkit, one of its ids.

    ImageNet's `ILSVRC2012_validation_ground_truth.txt` counts from 1 in an order of its
    own: it is refused where no meta.mat says which class each of its ids is.

    Raises:
        ValueError: Lines and images do not match, or a label is unclear or unknown.
    """
    builder.layout = f"images, labelled by {base_name(file.address)}"
    text, synsets = _read(file)
    labels = _match(text, file=file, images=builder.keys, numbering=numbering)
    builder.notes.extend(labels.notes)
    by_key = dict(zip(builder.keys, labels.texts, strict=True))
    if synsets is not None:
        by_key = _translate(by_key, ids=read_ids(synsets), file=file, synsets=synsets)
    builder.relabel(by_key.__getitem__, reason=f"no label in {base_name(file.address)}")
    distinct, num_images = sorted(builder.names()), len(builder.keys)
    if synsets is not None:
        ordered, by_name = resolve_names(distinct, numbering=numbering)
    else:
        _refuse_unclear_numbers(distinct, file=file, numbering=numbering)
        refuse_captions(
            distinct, num_images=num_images, numbering=numbering, most=MAX_OWN_LABELS
        )
        ordered, by_name = resolve_texts(distinct, numbering=numbering)
    return builder.finish(ordered, labels=by_name)


def _read(file: LabelFile) -> tuple[str, str | None]:
    """Read the text of labels, and for a devkit's ids the file that maps them."""
    place = StoragePath(file.address)
    kind = place.kind()
    if kind == pafs.FileType.NotFound:
        raise ValueError(f"There is no {place}.")
    if kind == pafs.FileType.Directory:
        for folder in ("data/", ""):
            name = f"{folder}ILSVRC2012_{GROUND_TRUTH}.txt"
            inner = child(file.address, name)
            if StoragePath(inner).kind() == pafs.FileType.File:
                return read_text(inner), file.synsets or ids_beside(inner)
        raise ValueError(f"expected a text of labels, got the folder {place}")
    if is_devkit(file.address):
        text = read_ground_truth(open_devkit(file.address))
        return text, file.synsets or file.address
    return read_text(file.address), file.synsets or ids_beside(file.address)


def _match(
    text: str, *, file: LabelFile, images: Sequence[str], numbering: Numbering
) -> _Labels:
    lines = [line for line in text.splitlines() if line.strip()]
    if text.lstrip()[:1] == "{":
        return _by_name(_of_json(text, file=file), file=file, images=images)
    are_classes = {plain(line) for line in lines} <= set(numbering.classes or ())
    is_ordered = are_classes or not _names_images(lines, images=images)
    if len(lines) == len(images) and is_ordered:
        _refuse_unclear_order(images, file=file)
        texts = [label_text(line) for line in lines]
        return _Labels(texts)
    rows = _split(lines)
    if all(len(row) == 1 for row in rows):
        raise ValueError(
            f"expected {len(images)} lines of one label, or lines of a name and a "
            f"label, in {file.address}, got {len(lines)} lines"
        )
    return _by_name(rows, file=file, images=images)


def _names_images(lines: Sequence[str], *, images: Sequence[str]) -> bool:
    """Check whether lines begin with names of files, rather than being labels."""
    rows = _split(lines)
    if max(map(len, rows)) < 2:
        return False
    find = _Finder(images)
    found = (find(cell) for row in rows for cell in row)
    return all(len(row) == 2 for row in rows) or any(at is not None for at in found)


def _split(lines: Sequence[str]) -> Rows:
    """Cut lines into cells, by tabs or commas, or else at the first blank."""
    if all("\t" in line for line in lines):
        return [[cell.strip() for cell in line.split("\t")] for line in lines]
    for mark in (",", ";"):
        try:
            rows = list(csv.reader(lines, delimiter=mark, skipinitialspace=True))
        except csv.Error:  # a cell of 128 kB and more
            continue
        if min(map(len, rows), default=0) > 1:
            return [[cell.strip() for cell in row] for row in rows]
    found = [line.strip().split(None, 1) for line in lines]
    return [[row[0].rstrip(","), *row[1:]] if len(row) > 1 else row for row in found]


def _of_json(text: str, *, file: LabelFile) -> Rows:
    try:
        found = json.loads(text)
        return [[name, label_text(label) or ""] for name, label in found.items()]
    except (ValueError, AttributeError, RecursionError):
        raise ValueError(
            f"expected a JSON object of labels by names in {file.address}, got others"
        ) from None


def _refuse_unclear_order(images: Sequence[str], *, file: LabelFile) -> None:
    def numbered(name: str) -> list[str | int]:
        parts = re.split(r"(\d+)", name)
        return [int(part) if part.isdecimal() else part for part in parts]

    if sorted(images, key=numbered) != list(images):
        raise ValueError(
            f"{file.address} has a label a line, but the images' order is unclear, as "
            f"their numbers have no leading zeros ({images[0]!r}, {images[1]!r}, ...): "
            "write lines NAME,LABEL."
        )


class _Finder:
    """Index from names to images: by path, or by a file name that is unique."""

    def __init__(self, images: Sequence[str]) -> None:
        self._paths = _places(images)
        self._bare_paths = _places(map(_without_suffix, images))
        names = [image.rpartition("/")[2] for image in images]
        self._names = _places(names)
        self._bare_names = _places(map(_without_suffix, names))

    def __call__(self, cell: str) -> int | None:
        """Return an image's place, -1 if the name is ambiguous, None if unknown."""
        parts = [plain(part) for part in cell.split("/") if part not in ("", ".")]
        for start in range(len(parts)):  # the text may name folders above the source
            name = "/".join(parts[start:])
            tables = [self._paths, self._bare_paths]
            if len(parts) == 1:
                tables += [self._names, self._bare_names]
            for form in (name, _without_suffix(name)):
                for places in tables:
                    if (place := places.get(form)) is not None:
                        return place
        return None


def _places(names: Iterable[str]) -> dict[str, int]:
    found: dict[str, int] = {}
    for place, name in enumerate(map(plain, names)):
        found[name] = -1 if name in found else place
    return found


def _without_suffix(name: str) -> str:
    folder, slash, file = name.rpartition("/")
    return f"{folder}{slash}{file.rpartition('.')[0] or file}"


def _by_name(rows: Rows, *, file: LabelFile, images: Sequence[str]) -> _Labels:
    rows = [row for row in rows if any(row)]
    place_of = _Finder(images)
    width = min(map(len, rows))
    counts = [sum(place_of(row[at]) is not None for row in rows) for at in range(width)]
    at = counts.index(max(counts))
    if not counts[at]:
        raise ValueError(
            f"expected one label an image in {file.address}, got none for "
            f"{images[0]!r} and names such as {rows[-1][0]!r}"
        )
    first = rows[0][at]
    head = None
    if place_of(first) is None and not is_picture_name(first):
        head = rows[0]
    rows = rows[1:] if head else rows
    column = _label_column(head, rows=rows, at=at, file=file)
    found: dict[int, str | None] = {}
    num_others = 0
    for row in rows:
        place = place_of(row[at])
        if place is None:
            num_others += 1
            continue
        if place < 0:
            raise ValueError(
                f"{file.address} labels {row[at]!r}, and several images have this "
                "name: write their paths in the source."
            )
        label = _label(row[column] if column < len(row) else "")
        if found.setdefault(place, label) != label:
            raise ValueError(
                f"expected one label an image in {file.address}, got one name twice: "
                f"{row[at]!r} is {found[place]!r} and {label!r}"
            )
    labels = _Labels([found.get(place) for place in range(len(images))])
    if head:
        labels.notes.append(f"labels are those of the column {head[column]!r}")
    elif len(rows[0]) > 2:
        labels.notes.append(
            f"labels are those of column {column + 1} of {len(rows[0])}"
        )
    if num_others:
        labels.notes.append(f"{num_others:,} labels are of no image in the source")
    return labels


def _label(text: str) -> str | None:
    boxes = _BOXES.fullmatch(text)
    return boxes[1] if boxes else label_text(text)


def _label_column(
    head: list[str] | None, *, rows: Rows, at: int, file: LabelFile
) -> int:
    width = max(map(len, rows))
    if file.column is not None:
        if head and file.column in head:
            return head.index(file.column)
        if file.column.isdecimal() and 1 <= int(file.column) <= width:
            return int(file.column) - 1
        columns = ", ".join(head or map(str, range(1, width + 1)))
        raise ValueError(
            f"expected --label-field as one of the columns of {file.address}, "
            f"{columns}, got {file.column!r}"
        )
    others = [column for column in range(width) if column != at]
    if len(others) == 1:
        return others[0]
    if head is None and others:
        return others[0]
    named = [c for c in others if head and head[c].lower() in _LABEL_COLUMNS]
    if len(named) != 1:
        raise ValueError(
            f"expected a column of names and one of labels in {file.address}, got "
            f"{', '.join(head or [])}; name that of the labels by --label-field"
        )
    return named[0]


def _translate(
    by_key: dict[str, str | None], *, ids: dict[str, str], file: LabelFile, synsets: str
) -> dict[str, str | None]:
    unknown = [text for text in by_key.values() if text and text not in ids]
    if unknown:
        raise ValueError(
            f"{file.address} has the id {unknown[0]!r}, {synsets} does not."
        )
    return {key: ids[text] if text else None for key, text in by_key.items()}


def _refuse_unclear_numbers(
    distinct: Sequence[str], *, file: LabelFile, numbering: Numbering
) -> None:
    if not distinct or not all(re.fullmatch(r"-?\d+", text) for text in distinct):
        return
    if GROUND_TRUTH in base_name(file.address):
        raise ValueError(
            f"{file.address} is the devkit's: its ids count from 1 in an order of "
            "their own. Give the devkit as it was downloaded, --labels "
            "ILSVRC2012_devkit_t12.tar.gz, or its meta.mat by --synsets."
        )
    if numbering.count_from is None and "0" not in distinct:
        raise ValueError(
            f"expected labels that count from 0 in {file.address}, got none that is 0; "
            "say --count-from 1, or --count-from 0 if class 0 has no image here. "
            "ImageNet's ids are in another order: they need the devkit by --synsets"
        )
    if numbering.classes is None:
        raise ValueError(
            f"{file.address} labels by number, which needs the order of the classes: "
            "give --classes FILE, for example the training set's classes.json."
        )
