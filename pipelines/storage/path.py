"""Read and write whole files wherever they lie."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TypeVar

import pyarrow as pa
import pyarrow.fs as pafs

from pipelines.storage.filesystem import open_filesystem
from pipelines.storage.redaction import without_credentials
from pipelines.storage.retry import is_remote, retrying

T = TypeVar("T")
PARTIAL_SUFFIX = ".partial"
# What is put into these is there whole or not at all. Elsewhere a file grows in sight.
_PUT_WHOLE = frozenset({"s3", "gcs", "abfs"})
_CHUNK_BYTES = 8 << 20


@dataclass(frozen=True)
class StoragePath:
    """File or folder at an address; nothing is opened before it is used.

    The methods retry where a store fails, and raise as `retrying` does.
    """

    address: str
    inner: str = ""
    """Path within the folder at the address."""

    def __str__(self) -> str:
        """Return the address for people: without credentials."""
        text = without_credentials(self.address)
        if not self.inner:
            return text
        text, mark, options = text.partition("?" if self.is_remote else "\0")
        return f"{text.rstrip('/')}/{self.inner}{mark}{options}"

    @property
    def is_remote(self) -> bool:
        """Whether it is reached by requests."""
        return is_remote(self.address)

    @property
    def name(self) -> str:
        """Last part of the path."""
        return PurePosixPath(self.open()[1]).name

    def open(self) -> tuple[pafs.FileSystem, str]:
        """Open the filesystem and return it with the path; see `open_filesystem`."""
        filesystem, root = open_filesystem(self.address)
        return filesystem, f"{root.rstrip('/')}/{self.inner}" if self.inner else root

    def within(self, name: str) -> StoragePath:
        """Return the place of something in this folder."""
        return StoragePath(self.address, f"{self.inner}/{name}" if self.inner else name)

    def kind(self) -> pafs.FileType:
        """Return whether a file, a folder or nothing is there."""
        return self._retrying(lambda files, path: files.get_file_info(path).type)

    def check_bucket(self) -> None:
        """Raise ValueError where this is in a bucket that does not exist."""

        def kind(files: pafs.FileSystem, path: str) -> pafs.FileType:
            if files.type_name not in _PUT_WHOLE:
                return pafs.FileType.Directory
            return files.get_file_info(path.partition("/")[0]).type

        if self._retrying(kind) == pafs.FileType.NotFound:
            raise ValueError(
                f"expected a place in a bucket that is there, got {str(self)!r}; make "
                "the bucket, or mend its name"
            )

    def entries(self) -> list[pafs.FileInfo]:
        """List a folder, sorted by path: a request for a thousand files in a bucket.

        Raises FileNotFoundError where there is none.
        """
        found = self._retrying(
            lambda files, path: files.get_file_info(pafs.FileSelector(path))
        )
        return sorted(found, key=lambda item: item.path)

    def read(self) -> bytes:
        """Read a file; FileNotFoundError where there is none."""

        def read(files: pafs.FileSystem, path: str) -> bytes:
            with files.open_input_stream(path) as stream:
                return stream.read()

        return self._retrying(read)

    def write(self, content: bytes) -> None:
        """Write a file, whole or not at all."""
        self._retrying(lambda files, path: _put(files, path, content=content))

    @contextlib.contextmanager
    def writing(self) -> Iterator[Path]:
        """Yield a local file to write, and put it in its place once it is whole."""
        if not self.is_remote:
            _, path = self.open()
            partial = Path(partial_name(path))
            yield partial
            os.replace(partial, path)
            return
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "whole")
            yield file
            with pa.memory_map(str(file)) as source:
                content = source.read_buffer()
                self._retrying(lambda files, path: _put(files, path, content=content))

    def download(self, file: Path) -> None:
        """Copy a file to a local one; FileNotFoundError where there is none."""

        def copy(files: pafs.FileSystem, path: str) -> None:
            with files.open_input_stream(path) as source, file.open("wb") as out:
                shutil.copyfileobj(source, out, _CHUNK_BYTES)

        self._retrying(copy)

    def make_folder(self) -> None:
        """Make a folder where the store has such a thing: a bucket has none."""

        def make(files: pafs.FileSystem, path: str) -> None:
            if files.type_name not in _PUT_WHOLE:
                files.create_dir(path)

        self._retrying(make)

    def delete(self) -> None:
        """Delete a file, if it is there."""
        with contextlib.suppress(FileNotFoundError):
            self._retrying(lambda files, path: files.delete_file(path))

    def delete_folder(self) -> None:
        """Delete a folder and all that is in it, if it is there."""
        with contextlib.suppress(FileNotFoundError):
            self._retrying(lambda files, path: files.delete_dir(path))

    def _retrying(self, function: Callable[[pafs.FileSystem, str], T]) -> T:
        filesystem, path = self.open()
        return retrying(lambda: function(filesystem, path), address=str(self))


def flush(path: Path) -> None:
    """Flush a local file's content, or a folder's names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def partial_name(path: str) -> str:
    """Return a unique name for a file that is to become `path` once it is whole.

    Every call names another: a process left over from a killed run must not write into
    the file of the next.
    """
    return f"{path}.{uuid.uuid4().hex}{PARTIAL_SUFFIX}"


def _put(files: pafs.FileSystem, path: str, *, content: bytes | pa.Buffer) -> None:
    # In one piece: a stream that is closed early keeps what it was given so far.
    target = path if files.type_name in _PUT_WHOLE else partial_name(path)
    with files.open_output_stream(target) as stream:
        stream.write(content)
    if target != path:
        if files.type_name == "local":
            flush(Path(target))  # else a power cut may leave an empty file of this name
        files.move(target, path)
