"""Read an image's header: its format, its size, and who decodes it.

These are the rules for every way to read an image. `decode_image` in `pillow_decode` is
the judge: its pixels are right, and what it refuses is bad. DALI is the fast way to the
same pixels for the kinds that it was found to decode alike (`is_plain`): JPEGs of 8
bits that are grey or YCbCr, PNGs of up to 8 bits, still WebPs. Of everything else DALI
is given the judge's pixels: it scales 16 bits, TIFFs and maximum values in its own way,
and refuses much that is whole.
"""

from __future__ import annotations

import io
import re
import struct
import zlib
from typing import NamedTuple

from PIL import Image, UnidentifiedImageError

# Pillow knows more formats, and starts Ghostscript for some of them.
_PILLOW_FORMATS = ("JPEG", "JPEG2000", "TIFF", "PNG", "BMP", "PPM", "WEBP")
# More pixels than this are taken for an attack or a mistake, as Pillow does.
_MAX_PIXELS = 2 * 89_478_485
_JPEG, PNG_MARK, _RIFF = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF"
_BY_PILLOW = (
    *(b"BM", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+", b"Pf"),
    *(b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51"),
    *(b"P%d" % number for number in range(1, 7)),
)
_PLAIN_PPM = re.compile(rb"P6\s(\d{1,9})\s(\d{1,9})\s255\s")
_OTHERS = (
    *((0, b"GIF8", "GIF"), (0, b"%!PS", "EPS"), (0, b"\xc5\xd0\xd3\xc6", "EPS")),
    *((0, b"\0\0\1\0", "ICO"), (0, b"8BPS", "PSD"), (0, b"\xff\x0a", "JPEG XL")),
    *((0, b"\0\0\0\x0cJXL ", "JPEG XL"), (0, b"II\xbc", "JPEG XR")),
    *((4, b"ftypavi", "AVIF"), (4, b"ftyphe", "HEIC"), (4, b"ftypmif1", "HEIC")),
    *((4, b"ftypmsf1", "HEIC"), (0, b"%PDF", "PDF"), (0, b"P7", "PAM")),
)
# Start-of-frame markers of all JPEG kinds: C0 to CF but tables and arithmetic hints.
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_BASELINE, _EXTENDED, PROGRESSIVE = 0xC0, 0xC1, 0xC2
_START_OF_SCAN, _RESTARTS, _JPEG_LS, _ADOBE, _JFIF = 0xDA, 0xDD, 0xF7, 0xEE, 0xE0
_END_OF_IMAGE = b"\xff\xd9"
TIFF_WIDTH, TIFF_HEIGHT = 256, 257


class BadImageError(ValueError):
    """Raised when the bytes are no image that is decoded here; the text says why."""


class JpegFrame(NamedTuple):
    """Contents of the segments before a JPEG's scan."""

    marker: int
    """The frame's kind, as its marker."""
    height: int
    width: int
    frame_start: int
    """Byte of the frame's marker."""
    scan_start: int
    """Byte after the first scan's own header."""
    num_components: int
    """Colours: 1 is grey, 3 YCbCr or RGB, 4 CMYK or YCCK."""
    restart_interval: int
    """Blocks (MCUs) between two restart markers; 0 where there are none."""
    is_plain: bool


class Header(NamedTuple):
    """Contents of an image's first bytes."""

    format: str
    """In Pillow's names."""
    height: int
    """Stored pixels, before any rotation by EXIF; width likewise."""
    width: int
    is_plain: bool
    """DALI decodes it to the pixels of `decode_image`."""
    frame: JpegFrame | None = None
    """Of a JPEG."""


def read_header(content: memoryview) -> Header:
    """Read an image's header, and check that its bytes look whole.

    Raises BadImageError for what is no image, of a format that is not decoded here, cut
    off, or of more pixels than any photograph.
    """
    start = bytes(content[:32])
    try:
        if start.startswith(_JPEG):
            header = _read_jpeg(content)
        elif start.startswith(PNG_MARK):
            header = _read_png(content)
        elif start.startswith(_RIFF) and start[8:12] == b"WEBP":
            header = _read_webp(content)
        elif match := _PLAIN_PPM.match(start):
            header = _read_ppm(content, match=match)
        elif start.startswith(_BY_PILLOW):
            header = _read_with_pillow(content)
        else:
            raise BadImageError(_unknown(start))
    except (IndexError, struct.error):
        raise BadImageError("broken header: it is cut off") from None
    size = f"{header.width}x{header.height} pixels"
    if header.height < 1 or header.width < 1:
        raise BadImageError(f"not an image in a known format, one of {size}")
    if header.height * header.width > _MAX_PIXELS:
        raise BadImageError(
            f"broken header: {size} are taken for a decompression bomb; up to "
            f"{_MAX_PIXELS} are decoded"
        )
    return header


def _unknown(start: bytes) -> str:
    if not start:
        return "empty file"
    for offset, mark, name in _OTHERS:
        if start.startswith(mark, offset):
            return f"format {name} is not decoded here: convert it to JPEG or PNG"
    return f"not an image in a known format, it begins with {start[:8]!r}"


def read_jpeg_frame(content: memoryview) -> JpegFrame:
    """Walk a JPEG's segments up to its first scan.

    Raises BadImageError where there is no frame or no scan.
    """
    at, num_bytes = 2, len(content)
    frame: tuple[int, int, int, int] | None = None
    is_plain, is_jfif, transform = True, False, -1
    precision, ids, interval = 8, b"", 0
    while at + 4 <= num_bytes:
        if content[at] != 0xFF:  # libjpeg skips to the next marker, others refuse
            is_plain = False
            at = bytes(content).find(b"\xff", at)
            if at < 0:
                break
            continue
        marker = content[at + 1]
        if marker == 0xFF or marker <= 0x01 or 0xD0 <= marker <= 0xD8:
            at += 1 if marker == 0xFF else 2  # padding, or a marker without a segment
            continue
        length = content[at + 2] << 8 | content[at + 3]
        if marker in _FRAMES:
            precision, height, width, num = struct.unpack_from(">BHHB", content, at + 4)
            ids = bytes(content[at + 10 : at + 10 + 3 * num : 3])
            frame = marker, height, width, at
        elif marker == _RESTARTS:
            interval = content[at + 4] << 8 | content[at + 5]
        elif marker == _ADOBE and bytes(content[at + 4 : at + 9]) == b"Adobe":
            transform = content[at + 15]
        elif marker == _JFIF and bytes(content[at + 4 : at + 8]) == b"JFIF":
            is_jfif = True
        elif marker == _JPEG_LS:
            raise BadImageError(
                "format JPEG-LS is not decoded here: convert it to JPEG or PNG"
            )
        at += 2 + length
        if marker == _START_OF_SCAN:
            break
    else:
        frame = None
    if frame is None:
        raise BadImageError(
            "not an image in a known format: a JPEG that is cut off in its header"
        )
    if precision != 8:
        raise BadImageError(
            f"JPEG of {precision}-bit samples is not decoded here: convert it to 8 bits"
        )
    is_rgb = len(ids) == 3 and (
        transform == 0 or (transform < 0 and not is_jfif and ids == b"RGB")
    )
    is_plain = is_plain and len(ids) in (1, 3) and not is_rgb
    is_plain = is_plain and frame[0] in (_BASELINE, _EXTENDED, PROGRESSIVE)
    return JpegFrame(*frame, at, len(ids), interval, is_plain)


def _read_jpeg(content: memoryview) -> Header:
    frame = read_jpeg_frame(content)
    ends = bytes(content[-2:]) == _END_OF_IMAGE
    at = frame.scan_start
    if at > len(content) or not (ends or _END_OF_IMAGE in bytes(content[at:])):
        raise BadImageError(
            "does not decode: a JPEG that is cut off, truncated before its "
            "end-of-image marker"
        )
    return Header("JPEG", frame.height, frame.width, frame.is_plain, frame)


def _read_png(content: memoryview) -> Header:
    if b"IEND" not in bytes(content[-12:]) and b"IEND" not in bytes(content):
        raise BadImageError(
            "does not decode: a PNG that is cut off, truncated before its IEND chunk"
        )
    width, height, depth, color = struct.unpack_from(">IIBB", content, 16)
    (checksum,) = struct.unpack_from(">I", content, 29)
    if bytes(content[12:16]) != b"IHDR" or zlib.crc32(content[12:29]) != checksum:
        raise BadImageError("broken header: a PNG whose first chunk is damaged")
    if color == 3 and not any(name == b"PLTE" for name, _, _ in png_chunks(content)):
        raise BadImageError("broken header: a PNG of a palette that is not there")
    return Header("PNG", height, width, depth <= 8)


def png_chunks(content: memoryview) -> list[tuple[bytes, int, int]]:
    """List a PNG's chunks: name, first byte, and the byte after its checksum."""
    chunks, at = [], len(PNG_MARK)
    while at + 12 <= len(content):
        (length,) = struct.unpack_from(">I", content, at)
        if at + 12 + length > len(content):
            break
        chunks.append((bytes(content[at + 4 : at + 8]), at, at + 12 + length))
        at += 12 + length
    return chunks


def is_sound_png(content: memoryview) -> bool:
    """Check a PNG's chunks as strict decoders do: checksums, and none unknown."""
    for name, start, end in png_chunks(content):
        if not name[:1].islower() and name not in (b"IHDR", b"PLTE", b"IDAT", b"IEND"):
            return False
        (wanted,) = struct.unpack_from(">I", content, end - 4)
        if zlib.crc32(content[start + 4 : end - 4]) != wanted:
            return False
        if name == b"IEND":
            return True
    return False


def _read_webp(content: memoryview) -> Header:
    (size,) = struct.unpack_from("<I", content, 4)
    if size + 8 > len(content):
        raise BadImageError("does not decode: a WebP that is cut off")
    kind = bytes(content[12:16])
    if kind == b"VP8X":
        width = 1 + int.from_bytes(content[24:27], "little")
        height = 1 + int.from_bytes(content[27:30], "little")
        is_animated = bool(content[20] & 0x02)
        return Header("WEBP", height, width, not is_animated)
    if kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", content, 21)
        return Header("WEBP", 1 + (bits >> 14 & 0x3FFF), 1 + (bits & 0x3FFF), True)
    width, height = struct.unpack_from("<HH", content, 26)
    return Header("WEBP", height & 0x3FFF, width & 0x3FFF, True)


def _read_ppm(content: memoryview, *, match: re.Match[bytes]) -> Header:
    width, height = int(match[1]), int(match[2])
    if match.end() + 3 * width * height > len(content):
        raise BadImageError("does not decode: a PPM that is cut off")
    return Header("PPM", height, width, True)


def _read_with_pillow(content: memoryview) -> Header:
    image = open_with_pillow(bytes(content))
    width, height = image.size
    tags = getattr(image, "tag_v2", None)
    if tags is not None:  # Pillow's size of a TIFF is the turned one
        width, height = int(tags[TIFF_WIDTH]), int(tags[TIFF_HEIGHT])
    return Header(str(image.format), height, width, False)


def open_with_pillow(
    content: bytes, *, formats: tuple[str, ...] = _PILLOW_FORMATS
) -> Image.Image:
    """Open an image of a format that is decoded here; its pixels are not read yet.

    Raises BadImageError where it is none, or its samples can't be shown as 8 bits.
    """
    try:
        image = Image.open(io.BytesIO(content), formats=formats)
    except UnidentifiedImageError:
        raise BadImageError("not an image in a known format") from None
    except Exception as error:  # Pillow's readers raise anything on broken headers
        raise BadImageError(f"broken header: {error}") from None
    # Floats and 32-bit integers have no range of their own: any scale is a guess.
    if image.mode == "F" or (image.mode == "I" and image.format == "TIFF"):
        raise BadImageError(
            f"{image.format} of 32-bit samples, which have no one way to be shown: "
            "convert it to 8 or 16 bits"
        )
    return image
