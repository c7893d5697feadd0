"""What a source holds: one record an image, and the class each label stands for."""

from __future__ import annotations

import hashlib
import json
import re
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs

from pipelines.files import Place
from pipelines.shards.format import CLASSES_FILE

RECORD_SCHEMA = pa.schema(
    [
        ("container", pa.int32()),  # place in Listing.containers
        ("offset", pa.int64()),  # byte in a tar, row in a Parquet file, else 0
        ("size_bytes", pa.int64()),  # of a Parquet row: its group's mean
        ("label", pa.int64()),
        ("key", pa.string()),
    ]
)


@dataclass(frozen=True)
class Skipped:
    """Something that is left out, and why."""

    key: str
    source: str
    reason: str


@dataclass(frozen=True)
class Listing:
    """All images of a source, in an order that depends on nothing but the source.

    Attributes:
        kind: What the source is: "folder", "tar" or "parquet".
        containers: Paths of the tars or Parquet files, or the root folder alone.
        classes: Class names; a name's place is its label.
        records: One row an image, columns of `RECORD_SCHEMA`.
        skipped: What was left out while listing.
    """

    kind: str
    containers: list[str]
    classes: list[str]
    records: pa.Table
    skipped: list[Skipped]

    def digest(self) -> str:
        """Digest everything but where the source lies."""
        digest = hashlib.sha256(json.dumps([self.kind, self.classes]).encode())
        digest.update(json.dumps([[s.key, s.reason] for s in self.skipped]).encode())
        for name in ("container", "offset", "size_bytes", "label"):
            digest.update(self.records[name].to_numpy().astype("<i8").tobytes())
        digest.update("\0".join(self.records["key"].to_pylist()).encode())
        return digest.hexdigest()


@dataclass
class Builder:
    """Collects records; a million of them take about 150 MB."""

    kind: str
    containers: list[str] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    _places: array[int] = field(default_factory=lambda: array("q"))
    _names: dict[str, int] = field(default_factory=dict)
    _keys: list[str] = field(default_factory=list)

    def add(self, key: str, *, name: str, offset: int, size_bytes: int) -> None:
        """Add one image of the latest container, labelled by a name or a number."""
        if not key.isascii() and not _is_text(key):
            self.skip(repr(key), source=self.containers[-1], reason="name is not UTF-8")
            return
        name_id = self._names.setdefault(name, len(self._names))
        self._places.extend((len(self.containers) - 1, offset, size_bytes, name_id))
        self._keys.append(key)

    def skip(self, key: str, *, source: str | Path, reason: str) -> None:
        """Leave something out, with the reason."""
        self.skipped.append(Skipped(key, source=str(source), reason=reason))

    def names(self) -> list[str]:
        """Give the distinct labels seen so far."""
        return list(self._names)

    def finish(self, classes: Sequence[str], *, labels: dict[str, int]) -> Listing:
        """Make the listing, once the labels' names are resolved.

        Raises:
            ValueError: There is no image, no class, or a key occurs twice.
        """
        if not self._keys:
            where = ", ".join(self.containers[:3]) or "the source"
            raise ValueError(f"Wanted images with labels, found none in {where}.")
        if not classes:
            raise ValueError(
                "The source names no classes: give them by --classes FILE."
            )
        places = np.frombuffer(self._places, dtype=np.int64).reshape(-1, 4)
        by_id = np.array([labels[name] for name in self._names], dtype=np.int64)
        records = pa.table(
            {
                "container": places[:, 0].astype(np.int32),
                "offset": places[:, 1],
                "size_bytes": places[:, 2],
                "label": by_id[places[:, 3]],
                "key": self._keys,
            },
            schema=RECORD_SCHEMA,
        )
        _refuse_repeated_keys(records["key"])
        return Listing(
            self.kind, self.containers, list(classes), records, skipped=self.skipped
        )


def _is_text(key: str) -> bool:
    try:
        key.encode()
    except UnicodeEncodeError:
        return False
    return True


def _refuse_repeated_keys(keys: pa.ChunkedArray) -> None:
    if len(keys.unique()) < len(keys):
        counts = keys.value_counts()
        repeated = counts.filter(np.asarray(counts.field("counts")) > 1)
        raise ValueError(
            f"Wanted every key once, but {len(repeated)} occur more often, for example "
            f"{repeated[0]['values']}: is a file in the source twice?"
        )


def check_member_name(name: str, *, tar: Path) -> str:
    """Give a tar member's name in plain form.

    Raises:
        ValueError: The name is absolute or climbs out of the archive.
    """
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(
            f"{tar} holds the member {name!r}: names that are absolute or hold '..' "
            "are refused; do not trust this archive."
        )
    return str(path)


def read_classes(address: str | Path) -> list[str]:
    """Read class names in the order of their labels.

    Args:
        address: A JSON list, a text with one name a line, or the folder of a shard set,
            on a path or in a bucket.

    Raises:
        ValueError: There is nothing, no name, or one occurs twice.
        OSError: It cannot be read.
    """
    place = Place(str(address))
    kind = place.kind()
    if kind == pafs.FileType.NotFound:
        raise ValueError(f"There is no {place}.")
    if kind == pafs.FileType.Directory:
        place = place.within(CLASSES_FILE)
    text = place.read().decode("utf-8")
    names = json.loads(text) if text.lstrip().startswith("[") else text.splitlines()
    names = [str(name).strip() for name in names]
    names = [name for name in names if name]
    if not names or len(set(names)) < len(names):
        found = "no name" if not names else "a name twice"
        raise ValueError(
            f"Wanted class names, each once, and found {found} in {place}."
        )
    return names


def resolve_names(
    names: Sequence[str], *, classes: Sequence[str] | None
) -> tuple[list[str], dict[str, int]]:
    """Number class names: by their place in `classes`, or else sorted.

    Raises:
        ValueError: A name is not among `classes`.
    """
    ordered = sorted(names) if classes is None else list(classes)
    labels = {name: place for place, name in enumerate(ordered)}
    unknown = sorted(set(names) - set(labels))
    if unknown:
        raise ValueError(
            f"{len(unknown)} labels are not among the {len(ordered)} classes, for "
            f"example {unknown[0]!r}: give the right --classes, or none."
        )
    return ordered, labels


def resolve_texts(
    texts: Sequence[str], *, classes: Sequence[str] | None
) -> tuple[list[str], dict[str, int]]:
    """Number labels that are class names or places counted from 0.

    Numbers without `classes` become the names "0", "1", ... themselves.

    Raises:
        ValueError: A number is outside the classes, a name is not among them, or the
            labels could be read either way with another outcome.
    """
    if not all(re.fullmatch(r"-?\d+", text) for text in texts):
        return resolve_names(texts, classes=classes)
    numbers = {text: int(text) for text in texts}
    top = max(numbers.values(), default=-1)
    ordered = [str(n) for n in range(top + 1)] if classes is None else list(classes)
    as_names = {name: place for place, name in enumerate(ordered)}
    named = [text for text in texts if text in as_names]
    if any(as_names[text] != numbers[text] for text in named):
        raise ValueError(
            f"A label such as {named[0]!r} is the name of one class and the place of "
            "another: order --classes so that both agree, or write other names."
        )
    outside = sorted(n for n in numbers.values() if not 0 <= n < len(ordered))
    if outside:
        raise ValueError(
            f"Wanted labels from 0 to {len(ordered) - 1}, got "
            f"{', '.join(map(str, outside[:3]))}: mend the labels or --classes."
        )
    return ordered, numbers
