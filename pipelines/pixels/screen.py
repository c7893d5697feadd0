"""Look at an image's bytes before a decoder does: most damage shows without decoding.

A decoder refuses a whole batch for one bad image, and a JPEG that was cut off passes
where the crop misses the hole. Here that image is found whatever its crop.
"""

from __future__ import annotations

import struct

import numpy as np

# More pixels than this are taken for an attack or a mistake, as Pillow does.
_MAX_PIXELS = 2 * 89_478_485
_JPEG, _PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"
_STARTS = (b"BM", b"II*\0", b"MM\0*", b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51")
_PNM = tuple(b"P%d" % number for number in range(1, 8))
# Start-of-frame markers of all JPEG kinds: C0 to CF but tables and arithmetic hints.
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_START_OF_SCAN, _END_OF_IMAGE = 0xDA, b"\xff\xd9"


def screen(encoded: np.ndarray, *, height: int, width: int) -> str:
    """Say why an image can't be decoded, or "" where its bytes look whole.

    Args:
        encoded: uint8 view of the file's bytes.
        height: Stored pixels, as the shard has them; width likewise.
    """
    content = encoded.data
    start = bytes(content[:16])
    if not start:
        return "empty"
    if height < 1 or width < 1 or height * width > _MAX_PIXELS:
        return f"{width}x{height} pixels, more than any photograph, or none"
    if start.startswith(_JPEG):
        return _screen_jpeg(content, height=height, width=width)
    if start.startswith(_PNG):
        return _screen_png(content, height=height, width=width)
    is_webp = start[:4] == b"RIFF" and start[8:12] == b"WEBP"
    if is_webp or start.startswith(_STARTS) or start.startswith(_PNM):
        return ""
    return f"not an image that is decoded here, it begins with {start[:8]!r}"


def _screen_jpeg(content: memoryview, *, height: int, width: int) -> str:
    """Walk the segments up to the scan; the end marker must come after it."""
    at, size, num_bytes = 2, None, len(content)
    while at + 4 <= num_bytes:
        if content[at] != 0xFF:
            return "a JPEG with a broken header"
        marker = content[at + 1]
        if marker == 0xFF or marker == 0x01 or 0xD0 <= marker <= 0xD7:
            at += 1 if marker == 0xFF else 2  # padding, or a marker without a segment
            continue
        (length,) = struct.unpack_from(">H", content, at + 2)
        if marker in _FRAMES and at + 9 <= num_bytes:
            size = struct.unpack_from(">HH", content, at + 5)
        at += 2 + length
        if marker == _START_OF_SCAN:
            break
    else:
        return "a JPEG that is cut off in its header"
    if size != (height, width):
        return f"a JPEG of (height, width) {size}, the shard says {(height, width)}"
    ends = bytes(content[-2:]) == _END_OF_IMAGE
    if at > num_bytes or not (ends or _END_OF_IMAGE in bytes(content[at:])):
        return "a JPEG that is cut off"
    return ""


def _screen_png(content: memoryview, *, height: int, width: int) -> str:
    ends = b"IEND" in bytes(content[-12:]) or b"IEND" in bytes(content)
    if len(content) < 24 or not ends:
        return "a PNG that is cut off"
    came_width, came_height = struct.unpack_from(">II", content, 16)
    if (came_height, came_width) != (height, width):
        came = (came_height, came_width)
        return f"a PNG of (height, width) {came}, the shard says {(height, width)}"
    return ""
