"""Number labels: which class each text stands for, or why that is ambiguous."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow.fs as pafs

from pipelines.data.shard_set import CLASSES_FILE
from pipelines.shards.stored import child, read_text
from pipelines.storage.path import StoragePath

MAX_NAME_LENGTH = 255
# Labels that are numbers make as many classes: more than these, and most of them
# without an image, are dates or ids.
MAX_NUMBERED = 1000
# Further labels that nearly every image has of its own are captions or file names.
MAX_OWN_LABELS = 100
_NUMBER = re.compile(r"(-?\d{1,18})(\.0*)?")
_DECIMAL = re.compile(r"-?\d*\.?\d+(e-?\d+)?", re.IGNORECASE)
_NUMBERED_LINE = re.compile(r"\s*(\d{1,9})(?:\s*[,:;]\s*|\s+)(\S.*)")
_WNID_LINE = re.compile(r"(n\d{8})\s+\S")


@dataclass(frozen=True)
class Numbering:
    """Options for the numbering of classes.

    Attributes:
        classes: Class names; a name's place is its label. None takes the source's.
        subset: Leave out images of classes that are not among `classes`.
        count_from: Number of the first class where labels are numbers; None is 0, and
            refuses labels that seem to count from 1.
    """

    classes: Sequence[str] | None = None
    subset: bool = False
    count_from: int | None = None


def plain(name: str) -> str:
    """Normalize a name as lists and folders agree on it: stripped and composed."""
    name = name.strip()
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def label_text(value: object) -> str | None:
    """Return a label's text, None for a missing one.

    Raises ValueError where the value is no label.
    """
    if value is None or value != value:  # NaN
        return None
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, (int, float, str)):
        raise ValueError(f"expected a name or a number as label, got {value!r:.60}")
    return plain(str(value)) or None


def read_classes(address: str | Path) -> list[str]:
    """Read class names in the order of their labels.

    Args:
        address: A text with one name a line; lines `0 tench`, `1 goldfish`, ...; lines
            `n01440764 tench`, of which the WordNet ids are the names; a JSON list, or
            an object of places by names or names by places; or the folder of a shard
            set. On a path or in a bucket.

    Raises:
        ValueError: There is nothing, no name, or one occurs twice.
        OSError: It cannot be read.
    """
    kind = StoragePath(str(address)).kind()
    if kind == pafs.FileType.NotFound:
        raise ValueError(f"There is no {StoragePath(str(address))}.")
    if kind == pafs.FileType.Directory:
        address = child(str(address), CLASSES_FILE)
    if str(address).lower().endswith((".yaml", ".yml")):
        raise ValueError(f"expected a text or JSON of class names, got {address}")
    text = read_text(address)
    return parse_classes(text, name=str(StoragePath(str(address))))


def parse_classes(text: str, *, name: str) -> list[str]:
    """Parse class names out of a text, see `read_classes`; `name` is the file's."""
    is_json = text.lstrip()[:1] in ("[", "{")
    names = _of_json(text, name=name) if is_json else _of_lines(text, name=name)
    names = [plain(item) for item in names]
    if not names or "" in names or len(set(names)) < len(names):
        repeated = [item for place, item in enumerate(names) if item in names[:place]]
        found = f"{repeated[0]!r}, a name twice" if repeated else "no name"
        raise ValueError(f"expected class names, each once, got {found} in {name}")
    return names


def _of_json(text: str, *, name: str) -> list[str]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError(f"{name} begins like JSON and is none: mend it.") from None
    if isinstance(found, dict):
        found = _in_order(found)
    if not isinstance(found, list) or not all(
        isinstance(item, (str, int)) and not isinstance(item, bool) for item in found
    ):
        raise ValueError(
            f"expected a list of class names in {name}, or an object of places 0, 1, "
            "... by names or names by places, got other JSON"
        )
    return [str(item) for item in found]


def _in_order(found: dict[str, object]) -> list[object] | None:
    places = set(range(len(found)))
    by_place = {place: key for key, place in found.items() if isinstance(place, int)}
    if set(by_place) == places:
        return [by_place[place] for place in range(len(found))]
    if set(found) != {str(place) for place in places}:
        return None
    values = [found[str(place)] for place in range(len(found))]
    # imagenet_class_index.json has [WordNet id, name] for each place.
    return [item[0] if isinstance(item, list) and item else item for item in values]


def _of_lines(text: str, *, name: str) -> list[str]:
    lines = text.rstrip().splitlines()
    empty = [place for place, line in enumerate(lines, start=1) if not line.strip()]
    if empty:
        raise ValueError(
            f"expected a class name on each line of {name}, got nothing on line "
            f"{empty[0]}; a name's line is its label, write one or take it out"
        )
    ids = [_WNID_LINE.match(line) for line in lines]
    if all(ids):
        return [match[1] for match in ids if match]
    numbered = [_NUMBERED_LINE.fullmatch(line) for line in lines]
    by_number = {int(match[1]): match[2] for match in numbered if match}
    if sorted(by_number) in (list(range(len(lines))), list(range(1, len(lines) + 1))):
        return [by_number[number] for number in sorted(by_number)]
    return lines


def resolve_names(
    names: Sequence[str], *, numbering: Numbering
) -> tuple[list[str], dict[str, int]]:
    """Number class names: by their place in `classes`, or else sorted.

    A name that is to be left out gets the label -1.

    Raises:
        ValueError: A name is not among `classes`, or no text for a name.
    """
    long = [name for name in names if len(name) > MAX_NAME_LENGTH]
    if long:
        raise ValueError(
            f"expected class names as labels, got a text of {len(long[0])} letters, "
            f"{long[0][:40]!r}...; name the right --label-field"
        )
    if numbering.classes is None:
        ordered = sorted(names)
        return ordered, {name: place for place, name in enumerate(ordered)}
    ordered = list(numbering.classes)
    labels = {name: place for place, name in enumerate(ordered)}
    unknown = sorted(set(names) - set(labels))
    if unknown and not numbering.subset:
        raise ValueError(
            f"{len(unknown)} labels are not among the {len(ordered)} classes, for "
            f"example {unknown[0]!r} (classes are {ordered[0]!r}, ...): give the right "
            "--classes, or none; or leave their images out by --subset."
        )
    return ordered, labels | dict.fromkeys(unknown, -1)


def resolve_texts(
    texts: Sequence[str], *, numbering: Numbering, own: Sequence[str] | None = None
) -> tuple[list[str], dict[str, int]]:
    """Number labels that are class names or numbers of classes.

    Numbers without class names become the names "0", "1", ... themselves.

    Args:
        texts: The distinct labels.
        numbering: What the user says of classes.
        own: The source's class names, which its numbers stand for.

    Raises:
        ValueError: A number is outside the classes, a name is not among them, or the
            labels could be read either way with another outcome.
    """
    matches = [_NUMBER.fullmatch(text) for text in texts]
    if not all(matches):
        if numbering.classes is None:
            _refuse_odd_numbers(texts, are_numbers=any(matches))
        return resolve_names(texts, numbering=numbering)
    first = numbering.count_from or 0
    numbers = {match[0]: int(match[1]) - first for match in matches if match}
    if own is not None:
        _refuse_outside(numbers, num_classes=len(own), numbering=numbering)
        names = {text: own[number] for text, number in numbers.items()}
        used = list(own) if numbering.classes is None else list(set(names.values()))
        if numbering.classes is None:
            return list(own), numbers
        ordered, labels = resolve_names(used, numbering=numbering)
        return ordered, {text: labels[name] for text, name in names.items()}
    if numbering.classes is None:
        _refuse_unbounded(numbers, numbering=numbering)
        top = max(numbers.values(), default=-1)
        _refuse_outside(numbers, num_classes=top + 1, numbering=numbering)
        return [str(n + first) for n in range(top + 1)], numbers
    return _numbers_or_names(numbers, numbering=numbering)


def _numbers_or_names(
    numbers: dict[str, int], *, numbering: Numbering
) -> tuple[list[str], dict[str, int]]:
    if numbering.subset:  # which is by name
        return resolve_names(list(numbers), numbering=numbering)
    ordered = list(numbering.classes or ())
    as_names = {name: place for place, name in enumerate(ordered)}
    are_names = numbering.count_from is None and all(n in as_names for n in numbers)
    are_places = all(0 <= n < len(ordered) for n in numbers.values())
    if are_names and are_places:
        unclear = [text for text in numbers if as_names[text] != numbers[text]]
        if unclear:
            raise ValueError(
                f"A label such as {unclear[0]!r} is the name of one class and the "
                "place of another: order --classes so that both agree, write other "
                "names, or say --count-from 0."
            )
    if are_names:
        return resolve_names(list(numbers), numbering=numbering)
    _refuse_outside(numbers, num_classes=len(ordered), numbering=numbering)
    return ordered, numbers


def _refuse_odd_numbers(texts: Sequence[str], *, are_numbers: bool) -> None:
    decimals = [t for t in texts if _DECIMAL.fullmatch(t) and not _NUMBER.fullmatch(t)]
    if decimals and all(_DECIMAL.fullmatch(text) for text in texts):
        raise ValueError(
            f"expected classes as labels, got numbers such as {decimals[0]}; give "
            "labels that are names or whole numbers, or name the right --label-field"
        )
    if are_numbers:
        number = next(text for text in texts if _NUMBER.fullmatch(text))
        name = next(text for text in texts if not _NUMBER.fullmatch(text))
        raise ValueError(
            f"expected labels that are all numbers or all names, got {number!r} and "
            f"{name!r}; if all are names, list them by --classes FILE"
        )


def _refuse_outside(
    numbers: dict[str, int], *, num_classes: int, numbering: Numbering
) -> None:
    first = numbering.count_from or 0
    outside = sorted(n + first for n in numbers.values() if not 0 <= n < num_classes)
    if not outside:
        return
    advice = "mend the labels or --classes"
    if outside[0] < 0:
        advice = "negative numbers mark images without a label; leave them out"
    elif outside == [num_classes] and 0 not in numbers.values():
        advice = "if they count from 1, say --count-from 1"
    to = f"to {num_classes - 1 + first}" if num_classes else "on"
    raise ValueError(
        f"expected labels from {first} {to}, got {', '.join(map(str, outside[:3]))}; "
        f"{advice}"
    )


def _refuse_unbounded(numbers: dict[str, int], *, numbering: Numbering) -> None:
    num_classes = max(numbers.values(), default=-1) + 1
    if num_classes > max(MAX_NUMBERED, 2 * len(numbers)):
        raise ValueError(
            f"expected labels that number the classes, got {len(numbers)} numbers up "
            f"to {num_classes - 1:,}, which would make {num_classes:,} classes; if "
            "they are names or these are some of many classes, list all by --classes "
            "FILE; if it is the wrong column, name the right --label-field"
        )
    if numbering.count_from is None and numbers and min(numbers.values()) == 1:
        raise ValueError(
            "expected labels that count from 0, got numbers from 1 to "
            f"{num_classes - 1}; say --count-from 1, or --count-from 0 if class 0 has "
            "no image here; or give --classes FILE"
        )


def refuse_captions(
    names: Sequence[str], *, num_images: int, numbering: Numbering, most: int
) -> None:
    """Raise ValueError where labels are most likely captions or ids, not classes.

    Args:
        names: The distinct labels.
        num_images: How many images have them.
        numbering: Class names that the user gives decide.
        most: As many labels are never refused.
    """
    if numbering.classes is not None or len(names) <= most:
        return
    if len(names) * 2 > num_images and not all(map(_NUMBER.fullmatch, names)):
        raise ValueError(
            f"expected labels that images share, got {len(names):,} for {num_images:,} "
            f"images, such as {names[0][:60]!r}; captions or names of files? Name the "
            "right --label-field, or list the classes by --classes FILE"
        )
