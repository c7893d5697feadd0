"""Reads the labels of images that come without classes, and refuses what is unclear."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from pipelines.shards.listing import resolve_names, resolve_texts

DEVKIT_NAME = "ILSVRC2012_validation_ground_truth"


def read_val_labels(
    path: Path,
    *,
    images: Sequence[str],
    synsets: Path | None,
    classes: Sequence[str] | None,
) -> tuple[list[str], list[str], dict[str, int]]:
    """Read one label an image.

    The text has a line an image in the order of the images' names, or lines
    `NAME LABEL` in any order. A label is a class name (for ImageNet a WordNet id), a
    place in --classes counted from 0, or, with --synsets, an id of the devkit.

    ImageNet's `ILSVRC2012_validation_ground_truth.txt` counts from 1 in an order of its
    own, not that of the sorted WordNet ids: it is refused without --synsets, a text of
    lines `ID WORDNET_ID`. The devkit's meta.mat has both, as ILSVRC2012_ID and WNID of
    its `synsets`; SciPy's `loadmat` reads it.

    Args:
        path: The text.
        images: Names of the images, sorted.
        synsets: Text that maps the ids to class names.
        classes: Class names in the order of their labels, if known.

    Returns:
        The label's text of each image, the class names, and each text's label.

    Raises:
        ValueError: Lines and images do not match, or a label is unclear or unknown.
    """
    texts = _read_texts(path, images=images)
    if synsets is not None:
        texts = _translate(texts, synsets=synsets, path=path)
        return texts, *resolve_names(sorted(set(texts)), classes=classes)
    distinct = sorted(set(texts))
    if all(re.fullmatch(r"-?\d+", text) for text in distinct):
        _refuse_unclear_numbers(distinct, path=path, classes=classes)
    return texts, *resolve_texts(distinct, classes=classes)


def _read_texts(path: Path, *, images: Sequence[str]) -> list[str]:
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = [re.split(r"[\s,]+", line.strip()) for line in lines if line.strip()]
    widths = {len(row) for row in rows}
    if widths == {1} and len(rows) == len(images):
        return [row[0] for row in rows]
    if widths != {2}:
        raise ValueError(
            f"Wanted {len(images)} lines of one label, or lines of a name and a label, "
            f"in {path}; got {len(rows)} lines of {sorted(widths)} words."
        )
    by_name = {Path(name).stem: label for name, label in rows}
    missing = [name for name in images if Path(name).stem not in by_name]
    if missing or len(by_name) < len(rows):
        problem = f"none for {missing[0]!r}" if missing else "one name twice"
        raise ValueError(f"Wanted one label an image in {path}, found {problem}.")
    return [by_name[Path(name).stem] for name in images]


def _translate(texts: Sequence[str], *, synsets: Path, path: Path) -> list[str]:
    lines = synsets.read_text(encoding="utf-8").splitlines()
    rows = [line.replace(",", " ").split() for line in lines if line.strip()]
    if any(len(row) < 2 or not row[0].isdigit() for row in rows):
        raise ValueError(f"Wanted lines `ID WORDNET_ID` in {synsets}.")
    names = {row[0]: row[1] for row in rows}
    unknown = [text for text in texts if text not in names]
    if unknown:
        raise ValueError(f"{path} has the id {unknown[0]!r}, {synsets} does not.")
    return [names[text] for text in texts]


def _refuse_unclear_numbers(
    distinct: Sequence[str], *, path: Path, classes: Sequence[str] | None
) -> None:
    if DEVKIT_NAME in path.name or "0" not in distinct:
        raise ValueError(
            f"{path} looks like the devkit's ground truth: its ids count from 1 in an "
            "order of their own. Give --synsets FILE with lines `ID WORDNET_ID` (from "
            "the devkit's meta.mat), or labels that are class names."
        )
    if classes is None:
        raise ValueError(
            f"{path} labels by number, which needs the order of the classes: give "
            "--classes FILE, for example the training set's classes.json."
        )
