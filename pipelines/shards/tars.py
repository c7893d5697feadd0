"""Lists images in tars, ImageNet's own and WebDataset's, without unpacking them.

A record says at which byte an image begins, so that any of them can be read at once.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from pipelines.shards.labels import read_val_labels
from pipelines.shards.listing import (
    Builder,
    Listing,
    check_member_name,
    resolve_names,
    resolve_texts,
)
from pipelines.shards.suffixes import IMAGE_SUFFIXES

BLOCK_BYTES = 512
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")


@dataclass(frozen=True)
class Member:
    """A member's plain name and where its bytes lie in the outermost file."""

    name: str
    offset: int
    size_bytes: int
    is_file: bool = True


def scan_tar(
    path: Path, *, start: int = 0, size_bytes: int | None = None
) -> Iterator[Member]:
    """Yield the members of a tar, or of a tar inside a tar, folders left out.

    Args:
        path: The outermost file.
        start: Byte where the archive begins in it.
        size_bytes: Length of the archive, if it does not fill the file.

    Raises:
        ValueError: It is compressed, damaged or cut short, or a name is not safe.
    """
    stop = path.stat().st_size if size_bytes is None else start + size_bytes
    with path.open("rb") as file:
        file.seek(start)
        if file.read(8).startswith(COMPRESSED):
            raise ValueError(f"{path} is compressed: unpack it to a plain tar first.")
        file.seek(start)
        try:
            tar = tarfile.TarFile(fileobj=file)
            while (info := tar.next()) is not None and info.offset < stop:
                tar.members.clear()  # type: ignore[attr-defined]
                if info.size < 0:  # the next member would be this one again, for ever
                    raise ValueError(f"{path} is damaged within {info.name!r}.")
                if info.offset_data + info.size > stop:
                    raise ValueError(f"{path} is cut short within {info.name!r}.")
                name = check_member_name(info.name, tar=path)
                if not info.isdir():
                    is_file = info.isreg() and not info.issparse()
                    yield Member(name, info.offset_data, info.size, is_file)
        except tarfile.TarError as error:
            raise ValueError(f"{path} is not a whole tar: {error}.") from None
        # tarfile takes a damaged header for the end; the true end is zeros or nothing.
        end = min(tar.offset, stop)
        file.seek(end)
        if file.read(min(BLOCK_BYTES, stop - end)).strip(b"\0"):
            raise ValueError(f"{path} is damaged at byte {end}.")


def _files(
    builder: Builder, *, path: Path, start: int = 0, size_bytes: int | None = None
) -> Iterator[Member]:
    for member in scan_tar(path, start=start, size_bytes=size_bytes):
        if member.is_file:
            yield member
        else:
            builder.skip(member.name, source=path, reason="not a plain file in its tar")


def list_class_tars(paths: Sequence[Path], *, classes: Sequence[str] | None) -> Listing:
    """List one tar a class: `n01440764.tar`, ..., or one tar that holds such tars.

    A class is named by its tar. Keys are CLASS/MEMBER, as in the unpacked tree.
    """
    builder = Builder("tar")
    for path in paths:
        builder.containers.append(str(path))
        first = next(scan_tar(path), None)
        if first is None or not first.name.endswith(".tar"):
            _add_class_tar(builder, path=path, name=path.stem)
            continue
        for inner in scan_tar(path):
            if not inner.name.endswith(".tar"):
                raise ValueError(f"{path} mixes class tars with {inner.name!r}.")
            _add_class_tar(
                builder,
                path=path,
                name=PurePosixPath(inner.name).stem,
                start=inner.offset,
                size_bytes=inner.size_bytes,
            )
    ordered, labels = resolve_names(builder.names(), classes=classes)
    return builder.finish(ordered, labels=labels)


def _add_class_tar(
    builder: Builder,
    *,
    path: Path,
    name: str,
    start: int = 0,
    size_bytes: int | None = None,
) -> None:
    for member in _files(builder, path=path, start=start, size_bytes=size_bytes):
        builder.add(
            f"{name}/{member.name}",
            name=name,
            offset=member.offset,
            size_bytes=member.size_bytes,
        )


def list_flat_tar(
    path: Path,
    *,
    labels_file: Path | None,
    synsets: Path | None,
    classes: Sequence[str] | None,
) -> Listing:
    """List a tar of images whose labels are in a text, as ImageNet's validation set.

    See `pipelines.shards.labels.read_val_labels` for what the text may be.
    """
    if labels_file is None:
        raise ValueError(
            f"{path} holds images without classes: give their labels by --labels FILE."
        )
    builder = Builder("tar", containers=[str(path)])
    members = sorted(_files(builder, path=path), key=lambda member: member.name)
    names, ordered, labels = read_val_labels(
        labels_file,
        images=[member.name for member in members],
        synsets=synsets,
        classes=classes,
    )
    for member, name in zip(members, names, strict=True):
        builder.add(
            member.name, name=name, offset=member.offset, size_bytes=member.size_bytes
        )
    return builder.finish(ordered, labels=labels)


@dataclass
class _Sample:
    images: list[Member] = field(default_factory=list)
    label: str | None = None
    problem: str = "no .cls and no .json with a label"


def list_webdataset(paths: Sequence[Path], *, classes: Sequence[str] | None) -> Listing:
    """List WebDataset tars: KEY.jpg (or .png, .webp, ...) beside KEY.cls or KEY.json.

    A .cls holds a class name or a place counted from 0; a .json has it under "label" or
    "cls". Keys are TAR/KEY.SUFFIX, since WebDataset's own are unique in a tar at most.
    """
    builder = Builder("tar")
    for path in paths:
        builder.containers.append(str(path))
        for key, sample in _read_samples(builder, path=path).items():
            name = f"{path.stem}/{key}"
            if len(sample.images) != 1:
                reason = f"{len(sample.images)} images in the sample, wanted one"
                builder.skip(name, source=path, reason=reason)
            elif sample.label is None:
                builder.skip(name, source=path, reason=sample.problem)
            else:
                image = sample.images[0]
                builder.add(
                    f"{path.stem}/{image.name}",
                    name=sample.label,
                    offset=image.offset,
                    size_bytes=image.size_bytes,
                )
    ordered, labels = resolve_texts(builder.names(), classes=classes)
    return builder.finish(ordered, labels=labels)


def _read_samples(builder: Builder, *, path: Path) -> dict[str, _Sample]:
    samples: dict[str, _Sample] = {}
    with path.open("rb") as file:
        for member in _files(builder, path=path):
            place = PurePosixPath(member.name)
            stem, _, suffix = place.name.partition(".")
            sample = samples.setdefault(str(place.with_name(stem or ".")), _Sample())
            if suffix.lower() in IMAGE_SUFFIXES:
                sample.images.append(member)
            elif suffix in ("cls", "json"):
                file.seek(member.offset)
                _take_label(sample, file.read(member.size_bytes), suffix=suffix)
    return samples


def _take_label(sample: _Sample, data: bytes, *, suffix: str) -> None:
    try:
        text = data.decode().strip()
        if suffix == "json":
            fields = json.loads(text)
            value = fields.get("label", fields.get("cls"))
            is_label = isinstance(value, (int, str)) and not isinstance(value, bool)
            text = str(value).strip() if is_label else ""
    except (ValueError, AttributeError, RecursionError):
        sample.problem = f"its .{suffix} cannot be read"
        return
    if text and (suffix == "cls" or sample.label is None):
        sample.label = text
