"""EXIF orientation: how a camera was held, of a JPEG, PNG, WebP or TIFF.

Cameras that are held upright store lying pixels and a tag that says how to turn them.
timm and torchvision ignore the tag, and so does `data.exif=ignore`, the default.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

import numpy as np

from pipelines.transforms.headers import PNG_MARK, png_chunks

_TAG, _SHORT, _NUM_ORIENTATIONS = 0x0112, 3, 8
_EXIF_MARK = b"Exif\0\0"
_APP1, _START_OF_SCAN = 0xE1, 0xDA
_TURNS: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: pixels[::-1].swapaxes(0, 1),
    7: lambda pixels: pixels[::-1, ::-1].swapaxes(0, 1),
    8: lambda pixels: pixels[:, ::-1].swapaxes(0, 1),
}


def orientation_of(content: memoryview) -> int:
    """Read an image's EXIF orientation, 1 to 8; 1, upright, where it has none.

    A tag that can't be read is none: it is no part of the picture.
    """
    try:
        found = _tag_of(_exif_of(content))
    except (IndexError, struct.error):
        return 1
    return found if 1 <= found <= _NUM_ORIENTATIONS else 1


def is_lying(orientation: int) -> bool:
    """Check whether an orientation swaps height and width."""
    return orientation >= 5


def turn(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Apply an EXIF orientation to stored pixels (H, W, C)."""
    if orientation not in _TURNS:
        return pixels
    return np.ascontiguousarray(_TURNS[orientation](pixels))


def _exif_of(content: memoryview) -> bytes:
    start = bytes(content[:16])
    if start.startswith(b"\xff\xd8\xff"):
        return _exif_of_jpeg(content)
    if start.startswith(PNG_MARK):
        chunks = png_chunks(content)
        found = [bytes(content[s + 8 : e - 4]) for n, s, e in chunks if n == b"eXIf"]
        return found[0] if found else b""
    if start.startswith(b"RIFF") and start[8:12] == b"WEBP":
        return _exif_of_webp(content)
    return bytes(content) if start[:2] in (b"II", b"MM") else b""


def _exif_of_jpeg(content: memoryview) -> bytes:
    at = 2
    while at + 4 <= len(content) and content[at] == 0xFF:
        marker = content[at + 1]
        if marker == 0xFF:
            at += 1
            continue
        end = at + 2 + (content[at + 2] << 8 | content[at + 3])
        if marker == _APP1 and bytes(content[at + 4 : at + 10]) == _EXIF_MARK:
            return bytes(content[at + 10 : end])
        if marker == _START_OF_SCAN:
            break
        at = end
    return b""


def _exif_of_webp(content: memoryview) -> bytes:
    at = 12
    while at + 8 <= len(content):
        (length,) = struct.unpack_from("<I", content, at + 4)
        if bytes(content[at : at + 4]) == b"EXIF":
            found = bytes(content[at + 8 : at + 8 + length])
            return found.removeprefix(_EXIF_MARK)
        at += 8 + length + length % 2
    return b""


def _tag_of(tiff: bytes) -> int:
    """Read the tag in the first directory of a TIFF, which EXIF is too."""
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None:
        return 1
    is_big = struct.unpack_from(f"{order}H", tiff, 2) == (43,)
    (start,) = struct.unpack_from(
        f"{order}{'Q' if is_big else 'I'}", tiff, 4 + 4 * is_big
    )
    (num,) = struct.unpack_from(f"{order}{'Q' if is_big else 'H'}", tiff, start)
    first, step = start + (8 if is_big else 2), 20 if is_big else 12
    for at in range(first, first + step * min(num, 1 << 12), step):
        tag, kind = struct.unpack_from(f"{order}HH", tiff, at)
        if tag == _TAG and kind == _SHORT:
            (value,) = struct.unpack_from(f"{order}H", tiff, at + step - 4 - 4 * is_big)
            return value
    return 1
