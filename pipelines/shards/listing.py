"""Listing of a source: one record an image, and the class each label stands for."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa

from pipelines.storage.redaction import without_credentials

Store = Literal["folder", "tar", "zip", "parquet"]
# No image that is trained on is larger; a shard keeps its images in memory.
MAX_IMAGE_BYTES = 1 << 30
RECORD_SCHEMA = pa.schema(
    [
        ("container", pa.int32()),  # place in Listing.containers
        ("offset", pa.int64()),  # byte in a tar or zip, row in a Parquet file, else 0
        ("size_bytes", pa.int64()),  # of a Parquet row: its group's mean
        ("label", pa.int64()),
        ("key", pa.string()),
    ]
)


def printable(text: str | Path) -> str:
    """Return a path that can be written as UTF-8, without credentials."""
    text = os.fsencode(str(text)).decode("utf-8", "backslashreplace")
    return without_credentials(text)


@dataclass(frozen=True)
class Fields:
    """Names of the part of a sample, or the columns, that are image and label."""

    image: str | None = None
    label: str | None = None


USUAL_FIELDS = Fields()


@dataclass(frozen=True)
class Skipped:
    """Image that is left out, and why."""

    key: str
    source: str
    reason: str


@dataclass(frozen=True)
class Listing:
    """Everything found in a source: its classes and all of its images.

    The images' order depends on nothing but the source.

    Attributes:
        kind: How images are stored: files of a "folder", in a "tar", "zip" or
            "parquet" file.
        containers: Paths or addresses of those files, or of the root folder alone.
        classes: Class names; a name's place is its label.
        records: One row an image, columns of `RECORD_SCHEMA`.
        skipped: Images that were left out while listing.
        layout: Where labels come from, for people.
        ignored: How many files are no images of the set, by reason.
        notes: What the user should look at.
        fields: The columns of Parquet files that were named.
    """

    kind: str
    containers: list[str]
    classes: list[str]
    records: pa.Table
    skipped: list[Skipped]
    layout: str = ""
    ignored: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    fields: Fields = USUAL_FIELDS

    def digest(self) -> str:
        """Compute a digest of everything but where the source lies."""
        digest = hashlib.sha256(json.dumps([self.kind, self.classes]).encode())
        digest.update(json.dumps([[s.key, s.reason] for s in self.skipped]).encode())
        for name in ("container", "offset", "size_bytes", "label"):
            digest.update(self.records[name].to_numpy().astype("<i8").tobytes())
        digest.update("\0".join(self.records["key"].to_pylist()).encode())
        return digest.hexdigest()


@dataclass
class Builder:
    """Collector of records; a million of them take about 150 MB."""

    kind: Store
    layout: str = ""
    fields: Fields = USUAL_FIELDS
    containers: list[str] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    ignored: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)
    _places: array[int] = field(default_factory=lambda: array("q"))
    _names: dict[str, int] = field(default_factory=dict)

    def add(
        self, key: str, *, size_bytes: int, name: str = "", offset: int = 0
    ) -> None:
        """Add one image of the latest container, labelled by a name or a number."""
        if not key.isascii() and printable(key) != key:
            self.skip(key, source=self.containers[-1], reason="name is not UTF-8")
            return
        if size_bytes > MAX_IMAGE_BYTES:
            reason = f"{size_bytes >> 20:,} MB are no image"
            self.skip(key, source=self.containers[-1], reason=reason)
            return
        name_id = self._names.setdefault(name, len(self._names))
        self._places.extend((len(self.containers) - 1, offset, size_bytes, name_id))
        self.keys.append(key)

    def skip(self, key: str, *, source: str | Path, reason: str) -> None:
        """Leave an image out, with the reason."""
        self.skipped.append(
            Skipped(printable(key), source=printable(source), reason=reason)
        )

    def names(self) -> list[str]:
        """List the distinct labels seen so far."""
        return list(self._names)

    def keep(self, is_kept: Callable[[str], bool], *, cut: int) -> int:
        """Drop images by their keys, and cut the start off the others' keys.

        Returns how many are left.
        """
        rows = [row for row, key in enumerate(self.keys) if is_kept(key)]
        self.keys = [self.keys[row][cut:] for row in rows]
        places = np.frombuffer(self._places, dtype=np.int64).reshape(-1, 4)[rows]
        self._places = array("q", places.tobytes())
        return len(rows)

    def relabel(self, name_of: Callable[[str], str | None], *, reason: str) -> None:
        """Label all images by their keys; those without a label are left out."""
        keys, places, width = self.keys, self._places, 4
        self._names = {}
        num = 0  # of those that stay; they move to the front, in their order
        for row, key in enumerate(keys):
            name, start = name_of(key), width * row
            if name is None:
                source = self._source(key, container=places[start])
                self.skip(key, source=source, reason=reason)
                continue
            if num < row:
                places[width * num : width * (num + 1)] = places[start : start + width]
                keys[num] = key
            num += 1
            name_id = self._names.setdefault(name, len(self._names))
            places[width * num - 1] = name_id
        del keys[num:], places[width * num :]

    def _source(self, key: str, *, container: int) -> str:
        place = self.containers[container]
        return f"{place.rstrip('/')}/{key}" if self.kind == "folder" else place

    def sort(self) -> None:
        """Order the images by their names."""
        order = sorted(range(len(self.keys)), key=self.keys.__getitem__)
        places = np.frombuffer(self._places, dtype=np.int64).reshape(-1, 4)[order]
        self.keys = [self.keys[row] for row in order]
        self._places = array("q", places.tobytes())

    def finish(self, classes: Sequence[str], *, labels: dict[str, int]) -> Listing:
        """Build the listing, once the labels' names are resolved.

        Args:
            classes: Class names in the order of their labels.
            labels: The label of each name; -1 leaves its images out.

        Raises:
            ValueError: There is no image, no class, or a key occurs twice.
        """
        places = np.frombuffer(self._places, dtype=np.int64).reshape(-1, 4)
        by_id = np.array([labels[name] for name in self._names], dtype=np.int64)
        found = by_id[places[:, 3]] if len(places) else np.zeros(0, np.int64)
        records = pa.table(
            {
                "container": places[:, 0].astype(np.int32),
                "offset": places[:, 1],
                "size_bytes": places[:, 2],
                "label": found,
                "key": self.keys,
            },
            schema=RECORD_SCHEMA,
        )
        if num_others := int(np.sum(found < 0)):
            self.ignored["of classes that --classes does not name"] += num_others
            records = records.filter(pa.array(found >= 0))
        self._refuse_nothing(records, classes=classes)
        _refuse_repeated_keys(records["key"])
        return Listing(
            self.kind,
            self.containers,
            list(classes),
            records,
            skipped=self.skipped,
            layout=self.layout,
            ignored=dict(self.ignored),
            notes=self.notes,
            fields=self.fields,
        )

    def _refuse_nothing(self, records: pa.Table, *, classes: Sequence[str]) -> None:
        if not len(records):
            raise ValueError(
                "expected images with labels, got "
                f"none{self.reasons() or '; it is empty'}; in {self._where()}"
            )
        if not classes:
            raise ValueError(
                "The source names no classes: give them by --classes FILE."
            )

    @contextlib.contextmanager
    def explaining(self) -> Iterator[None]:
        """Add to a ValueError what was left out before it, and where."""
        try:
            yield
        except ValueError as error:
            said = f"{str(error).rstrip('.')}{self.reasons()} (in {self._where()})."
            raise ValueError(said) from None

    def _where(self) -> str:
        more = ", ..." * (len(self.containers) > 3)
        return ", ".join(map(printable, self.containers[:3])) + more or "the source"

    def reasons(self) -> str:
        """Summarize by count what was left out or ignored so far; "" if nothing was."""
        by_reason: dict[str, list[str]] = {}
        for item in self.skipped:
            by_reason.setdefault(item.reason, []).append(item.key)
        parts = [
            f"{len(keys):,} left out: {reason} ({keys[0]!r})"
            for reason, keys in sorted(by_reason.items(), key=lambda of: -len(of[1]))
        ]
        parts += [f"{num:,} ignored: {why}" for why, num in self.ignored.items()]
        return "".join(f"; {part}" for part in parts[:4])


def _refuse_repeated_keys(keys: pa.ChunkedArray) -> None:
    if len(keys.unique()) < len(keys):
        counts = keys.value_counts()
        repeated = counts.filter(np.asarray(counts.field("counts")) > 1)
        raise ValueError(
            f"expected every key once, got {len(repeated)} that occur more often, for "
            f"example {repeated[0]['values']}; is a file in the source twice?"
        )
