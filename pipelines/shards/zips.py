"""List images in a zip and read them where they lie, without unpacking it."""

from __future__ import annotations

import struct
import zipfile
import zlib
from typing import BinaryIO

from pipelines.shards.listing import Builder
from pipelines.shards.stored import open_stored, order_of
from pipelines.shards.tars import check_member_name
from pipelines.shards.tree import Tree

_HEADER = struct.Struct("<4s5H3I2H")  # of a file within a zip
_STORED, _DEFLATED = 0, 8
_CHUNK_BYTES = 1 << 20


def list_zip(address: str) -> Tree:
    """List the files of a zip.

    Raises:
        ValueError: It is damaged or cut short, or a name is not safe.
    """
    tree = Tree(address, Builder("zip", containers=[address]))
    try:
        with open_stored(address) as file, zipfile.ZipFile(file) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, EOFError) as error:
        raise ValueError(f"{address} is not a whole zip: {error}.") from None
    for member in members:
        check_member_name(member.filename, archive=address)
    for member in sorted(members, key=lambda member: order_of(member.filename)):
        if member.is_dir():
            continue
        reason = _unreadable(member)
        if reason:
            tree.builder.skip(member.filename, source=address, reason=reason)
            continue
        tree.add(
            member.filename, size_bytes=member.file_size, offset=member.header_offset
        )
    tree.find_folders()
    return tree


def _unreadable(member: zipfile.ZipInfo) -> str:
    if member.flag_bits & 0x1:
        return "encrypted in its zip"
    if member.compress_type not in (_STORED, _DEFLATED):
        return f"compressed by method {member.compress_type} in its zip"
    return ""


def read_member(file: BinaryIO, *, offset: int, size_bytes: int) -> bytes:
    """Read one file of a zip.

    Args:
        file: The zip.
        offset: Byte at which the file's header begins.
        size_bytes: Length of the file; no more is made of it.

    Raises:
        ValueError: It is damaged.
    """
    file.seek(offset)
    header = file.read(_HEADER.size)
    if len(header) < _HEADER.size or header[:4] != b"PK\x03\x04":
        raise ValueError("damaged in its zip")
    fields = _HEADER.unpack(header)
    method, name_bytes, extra_bytes = fields[3], fields[9], fields[10]
    file.seek(offset + _HEADER.size + name_bytes + extra_bytes)
    if method == _STORED:
        return file.read(size_bytes)
    unpacker = zlib.decompressobj(-zlib.MAX_WBITS)
    parts, left = [], size_bytes
    try:
        while left and not unpacker.eof:
            chunk = file.read(min(_CHUNK_BYTES, left + 1024))
            if not chunk:
                break
            while chunk and left:
                part = unpacker.decompress(chunk, left)
                parts.append(part)
                left -= len(part)
                chunk = unpacker.unconsumed_tail
    except zlib.error:
        raise ValueError("damaged in its zip") from None
    if left:
        raise ValueError("cut short in its zip")
    return b"".join(parts)
