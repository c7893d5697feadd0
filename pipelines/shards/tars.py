"""List images in tars without unpacking them.

A record says at which byte an image begins, so that any of them can be read directly.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from pipelines.shards.classes import Numbering, plain, resolve_names
from pipelines.shards.listing import Builder, Listing, printable
from pipelines.shards.names import (
    HIDDEN,
    has_litter,
    is_other,
    other_files,
)
from pipelines.shards.stored import open_stored, stem, suffix
from pipelines.shards.suffixes import IMAGE_SUFFIXES
from pipelines.shards.tree import Tree

BLOCK_BYTES = 512
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")
LABEL_SUFFIXES = frozenset({"cls", "json", "txt", "label", "class"})
_FIRST_MEMBERS = 16


def check_member_name(name: str, *, archive: str | Path) -> str:
    """Normalize an archive member's name.

    Raises:
        ValueError: The name is absolute or climbs out of the archive.
    """
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(
            f"{archive} holds the member {name!r}: names that are absolute or hold "
            "'..' are refused; do not trust this archive."
        )
    return str(path)


@dataclass(frozen=True, slots=True)
class Member:
    """A member's normalized name and where its bytes lie in the outermost file."""

    name: str
    offset: int
    size_bytes: int
    is_file: bool = True


def scan_tar(
    path: str | Path, *, start: int = 0, size_bytes: int | None = None
) -> Iterator[Member]:
    """Yield the members of a tar, or of a tar inside a tar, folders left out.

    Args:
        path: The outermost file.
        start: Byte where the archive begins in it.
        size_bytes: Length of the archive, if it does not fill the file.

    Raises:
        ValueError: It is compressed, damaged or cut short, or a name is not safe.
    """
    with open_stored(path) as file:
        stop = file.seek(0, 2) if size_bytes is None else start + size_bytes
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
                name = check_member_name(info.name, archive=path)
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


def image_files(
    builder: Builder, *, path: str, start: int = 0, size_bytes: int | None = None
) -> Iterator[Member]:
    """Yield the regular files of a tar that are no litter."""
    for member in scan_tar(path, start=start, size_bytes=size_bytes):
        if has_litter(member.name):
            builder.ignored[HIDDEN] += 1
        elif member.is_file:
            yield member
        else:
            builder.skip(member.name, source=path, reason="not a plain file in its tar")


@dataclass
class Sketch:
    """Summary of what a tar holds, from a look at its members.

    Attributes:
        kind: Tars within it, "nested"; samples of images and labels, "webdataset"; or
            "images" alone.
        folders: The top folders of its first members, or of all if it is read whole.
    """

    kind: str
    folders: set[str] = field(default_factory=set)


def sketch_tar(path: str, *, whole: bool) -> Sketch:
    """Detect what a tar holds by its first members.

    Args:
        path: The tar.
        whole: Read on where these are images alone: their labels may come after.
    """
    found, keys, sides = Sketch("images"), set[str](), set[str]()
    num = 0
    for member in scan_tar(path):
        if has_litter(member.name):
            continue
        num += 1
        if num > _FIRST_MEMBERS and not whole:
            break
        found.folders.add(member.name.partition("/")[0] if "/" in member.name else "")
        kind = suffix(member.name)
        if kind == "tar":
            return Sketch("nested")
        if kind == "cls":
            return Sketch("webdataset")
        key = sample_key(member.name)
        if kind in IMAGE_SUFFIXES:
            keys.add(key)
        elif kind in LABEL_SUFFIXES:
            sides.add(key)
        if key in keys and key in sides:
            return Sketch("webdataset")
    return found


def sample_key(name: str) -> str:
    """Return the key of a WebDataset sample's files: all up to the first dot."""
    folder, slash, file = name.rpartition("/")
    return f"{folder}{slash}{file.partition('.')[0]}"


def list_class_tars(paths: Sequence[str], *, numbering: Numbering) -> Listing:
    """List one tar a class: `n01440764.tar`, ..., or one tar that holds such tars.

    A class is named by its tar. Keys are CLASS/MEMBER, as in the unpacked tree.
    """
    builder = Builder("tar", layout="tars of a class each")
    for path in paths:
        builder.containers.append(path)
        if sketch_tar(path, whole=False).kind != "nested":
            _add_class_tar(builder, path=path, name=stem(path))
            continue
        for inner in image_files(builder, path=path):
            if not inner.name.endswith(".tar"):
                reason = "not within a class's tar"
                builder.skip(inner.name, source=path, reason=reason)
                continue
            _add_class_tar(
                builder,
                path=path,
                name=PurePosixPath(inner.name).stem,
                start=inner.offset,
                size_bytes=inner.size_bytes,
            )
    with builder.explaining():
        ordered, labels = resolve_names(builder.names(), numbering=numbering)
    return builder.finish(ordered, labels=labels)


def _add_class_tar(
    builder: Builder,
    *,
    path: str,
    name: str,
    start: int = 0,
    size_bytes: int | None = None,
) -> None:
    if printable(name) != name:
        builder.skip(f"{name}.tar", source=path, reason="the class is not UTF-8")
        return
    for member in image_files(builder, path=path, start=start, size_bytes=size_bytes):
        if is_other(member.name):
            builder.ignored[other_files(member.name)] += 1
            continue
        builder.add(
            f"{name}/{member.name}",
            name=plain(name),
            offset=member.offset,
            size_bytes=member.size_bytes,
        )


def list_tar_tree(paths: Sequence[str], *, root: str) -> Tree:
    """List the files of tars as one tree of folders, by name."""
    tree = Tree(root, Builder("tar"))
    for path in paths:
        tree.builder.containers.append(path)
        for member in image_files(tree.builder, path=path):
            tree.add(member.name, size_bytes=member.size_bytes, offset=member.offset)
    tree.builder.sort()
    tree.find_folders()
    return tree
