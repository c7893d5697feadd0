"""Read fields of a struct array in a MATLAB 5 file such as ImageNet's meta.mat.

SciPy reads them too, but is no requirement of ours. The format: MathWorks, "MAT-File
Format", level 5; little-endian files, compressed or not.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

import numpy as np

_HEADER_BYTES = 128
_MATRIX, _COMPRESSED = 14, 15
_STRUCT_CLASS = 2
_MAX_BYTES = 64 << 20
_NUMBERS = {
    1: "<i1",
    2: "<u1",
    3: "<i2",
    4: "<u2",
    5: "<i4",
    6: "<u4",
    7: "<f4",
    9: "<f8",
    12: "<i8",
    13: "<u8",
}
_TEXTS = {16: "utf-8", 17: "utf-16-le", 18: "utf-32-le"}

Element = tuple[int, bytes]


def read_structs(data: bytes, *, name: str, fields: tuple[str, ...]) -> list[list[str]]:
    """Read fields of each element of a struct array, numbers as texts.

    Args:
        data: The file.
        name: The array's.
        fields: Names of fields that hold one number or one text.

    Raises:
        ValueError: It is not such a file, or holds no such array.
    """
    try:
        for kind, body in _elements(data[_HEADER_BYTES:]):
            if kind == _COMPRESSED:
                unpacker = zlib.decompressobj()
                kind, body = next(_elements(unpacker.decompress(body, _MAX_BYTES)))
            if kind == _MATRIX:
                found = _structs(body, name=name, fields=fields)
                if found is not None:
                    return found
    except (struct.error, zlib.error, IndexError, StopIteration, KeyError) as error:
        raise ValueError(f"not a whole MATLAB 5 file ({error})") from None
    raise ValueError(f"no struct array {name} with {', '.join(fields)} in it")


def _elements(data: bytes) -> Iterator[Element]:
    """Yield type and bytes of each data element."""
    place = 0
    while place + 8 <= len(data):
        word, size = struct.unpack_from("<II", data, place)
        if word >> 16:  # a small element: its size, its type and up to four bytes
            kind, size, start, step = word & 0xFFFF, word >> 16, place + 4, 8
        else:
            kind, start = word, place + 8
            # What is compressed is not padded.
            step = 8 + (size if kind == _COMPRESSED else -(-size // 8) * 8)
        if start + size > len(data):
            raise IndexError("cut short")
        yield kind, data[start : start + size]
        place += step


def _structs(
    body: bytes, *, name: str, fields: tuple[str, ...]
) -> list[list[str]] | None:
    parts = _elements(body)
    flags = next(parts)[1]
    dims = np.frombuffer(next(parts)[1], "<i4")
    if flags[0] != _STRUCT_CLASS or next(parts)[1].decode("latin-1") != name:
        return None
    width = int(np.frombuffer(next(parts)[1], "<i4")[0])
    text = next(parts)[1]
    names = [
        text[start : start + width].split(b"\0")[0].decode("latin-1")
        for start in range(0, len(text), max(1, width))
    ]
    if not set(fields) <= set(names):
        return None
    rows = []
    for _ in range(int(np.prod(dims, dtype=np.int64))):
        values = {field: next(parts)[1] for field in names}
        rows.append([_value(values[field]) for field in fields])
    return rows


def _value(body: bytes) -> str:
    """Return the one number or text of a small matrix."""
    parts = _elements(body)
    flags = next(parts)[1]
    next(parts)  # dimensions
    next(parts)  # name
    kind, data = next(parts, (2, b""))
    if kind in _TEXTS:
        return data.decode(_TEXTS[kind])
    values = np.frombuffer(data, _NUMBERS[kind])
    if flags[0] == 4:  # characters
        return "".join(map(chr, values.tolist()))
    return str(int(values[0])) if len(values) else ""
