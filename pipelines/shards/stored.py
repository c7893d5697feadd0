"""Find, list and open what a source is made of, on a disk or in a bucket."""

from __future__ import annotations

import fnmatch
import io
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO, cast

import pyarrow.fs as pafs

from pipelines.storage.path import StoragePath
from pipelines.storage.retry import is_remote, retrying

# A tar in a bucket is read from front to back: a request for each header would take a
# round trip an image.
_REMOTE_BUFFER_BYTES = 8 << 20


def child(address: str, name: str) -> str:
    """Return the address of something within a folder; options of the address stay."""
    if not is_remote(address):
        return os.path.join(address, name)
    place, mark, options = address.partition("?")
    return f"{place.rstrip('/')}/{name}{mark}{options}"


def base_name(address: str) -> str:
    """Return a file's name without its folders and options."""
    if is_remote(address):
        address = address.partition("?")[0]
    return PurePosixPath(address).name


def stem(address: str) -> str:
    """Return a file's name without its folders and its last suffix."""
    return PurePosixPath(base_name(address)).stem


def suffix(name: str) -> str:
    """Return the last suffix in lower case, without its dot."""
    return name.rpartition(".")[2].lower() if "." in name.strip(".") else ""


def find(source: str) -> tuple[list[str], bool]:
    """List the addresses that a source means, and whether it is one folder.

    Raises ValueError where there is nothing.
    """
    kind = StoragePath(source).kind()
    if kind != pafs.FileType.NotFound:
        return [source], kind == pafs.FileType.Directory
    options = source.partition("?")[2] if is_remote(source) else ""
    plain = source.partition("?")[0] if options.count("=") else source
    folder, _, pattern = plain.rpartition("/")
    if any(letter in pattern for letter in "*?["):
        found = [
            child(folder or ".", name)
            for name in sorted(_names(folder or "."))
            if fnmatch.fnmatchcase(name, pattern)
        ]
        if found:
            return found, False
    raise ValueError(
        f"There is no {StoragePath(source)}: "
        "name a folder, a tar, a zip or Parquet files."
    )


def _names(folder: str) -> list[str]:
    try:
        return [entry.base_name for entry in StoragePath(folder).entries()]
    except (FileNotFoundError, NotADirectoryError):
        return []


def open_stored(address: str | Path, *, reads_on: bool = True) -> BinaryIO:
    """Open a file for random access.

    Args:
        address: A path or an address.
        reads_on: Most of it is read, from front to back.
    """
    if not is_remote(str(address)):
        return Path(str(address)).open("rb")
    filesystem, path = StoragePath(str(address)).open()
    file = retrying(lambda: filesystem.open_input_file(path), address=str(address))
    if not reads_on:
        return cast("BinaryIO", file)
    return cast("BinaryIO", io.BufferedReader(file, _REMOTE_BUFFER_BYTES))  # type: ignore[arg-type]


def read_stored(address: str | Path) -> bytes:
    """Read a whole file; ValueError names the file where there is none."""
    place = StoragePath(str(address))
    try:
        return place.read()
    except FileNotFoundError:
        raise ValueError(f"There is no {place}.") from None
    except IsADirectoryError:
        raise ValueError(f"expected a file, got the folder {place}") from None


def read_text(address: str | Path) -> str:
    """Read a UTF-8 text, with or without a byte order mark."""
    return decode_text(read_stored(address), name=str(StoragePath(str(address))))


def decode_text(data: bytes, *, name: str) -> str:
    """Decode UTF-8, with or without a byte order mark.

    Raises ValueError, with the file's name, where it is something else.
    """
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(
            f"expected UTF-8 text in {name}, got other bytes; save it as UTF-8"
        ) from None


def order_of(key: str) -> tuple[tuple[int, str], ...]:
    """Return a path's sort key: a folder's files before its folders, as a walk goes."""
    *folders, name = key.split("/")
    return (*((1, folder) for folder in folders), (0, name))


def list_remote(address: str) -> Iterator[tuple[str, int]]:
    """Yield path and size of all files below a folder of a bucket, in walking order."""
    filesystem, root = StoragePath(address).open()
    selector = pafs.FileSelector(root, recursive=True)
    found = retrying(lambda: filesystem.get_file_info(selector), address=address)
    start = len(root.rstrip("/")) + 1
    files = [
        (info.path[start:], info.size)
        for info in found
        if info.type == pafs.FileType.File
    ]
    yield from sorted(files, key=lambda file: order_of(file[0]))
