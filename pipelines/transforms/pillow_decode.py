"""Decode with Pillow: the judge of what an image shows, and of what is bad.

DALI's twin where DALI has no wheel, and what it is given for the kinds of images that
it decodes otherwise; see `headers`.

Cameras that are held upright store lying pixels and a tag of EXIF that says how to turn
them. timm and torchvision ignore it, and so does `data.exif=ignore`, the default.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pipelines.config import Exif
from pipelines.transforms.crops import Geometry
from pipelines.transforms.headers import (
    PNG_MARK,
    BadImageError,
    Header,
    is_sound_png,
    open_with_pillow,
    png_chunks,
    read_header,
)

_ORIENTATION = 0x0112
# What undoes the turn that Pillow gives a TIFF.
_UNDO = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
_PICTURE_CHUNKS = frozenset({b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"})
_CHUNK_BYTES, _STRIP_PIXELS = 1 << 20, 1 << 22
_SHORT, _NUM_ORIENTATIONS = 3, 8
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


def pillow_windows(
    encoded: Sequence[np.ndarray], geometry: Geometry, *, exif: Exif = "ignore"
) -> list[Tensor]:
    """Decode a window of each image: uint8 (height, width, 3).

    Raises BadImageError where an image is bad.
    """
    windows = []
    for at, view in enumerate(encoded):
        pixels = decode_image(view.tobytes(), exif=exif)
        top, left = geometry.start[at].tolist()
        height, width = geometry.window[at].tolist()
        window = pixels[top : top + height, left : left + width]
        if window.shape[:2] != (height, width):
            raise BadImageError(
                f"an image of {pixels.shape[1]}x{pixels.shape[0]} pixels, smaller "
                "than the shard says"
            )
        windows.append(torch.from_numpy(np.ascontiguousarray(window)))
    return windows


def decode_image(content: bytes, *, exif: Exif = "ignore") -> np.ndarray:
    """Decode an image to uint8 (height, width, 3), RGB.

    16-bit samples are scaled to 8 bits, alpha is dropped, an animation shows its first
    picture. Pixels are as they are stored, a TIFF's too, unless `exif` turns them.

    Raises BadImageError, which says why, where the image is bad.
    """
    pixels = to_rgb(load_image(content))
    if exif == "rotate":
        pixels = turn(pixels, orientation_of(memoryview(content)))
    return pixels


def load_image(content: bytes, *, header: Header | None = None) -> Image.Image:
    """Decode an image as Pillow holds it, in the order in which it is stored.

    Raises BadImageError where it is bad.
    """
    view = memoryview(content)
    header = header or read_header(view)
    try:
        image = _loaded(content, header)
    except (BadImageError, MemoryError):
        raise
    except Exception as error:  # Pillow raises OSError, SyntaxError, struct.error, ...
        raise BadImageError(f"does not decode: {error}") from None
    if image.size != (header.width, header.height):
        raise BadImageError("does not decode: its header has another size")
    if header.format == "PNG" and _ends_dark(image) and _is_short(view, image=image):
        raise BadImageError("does not decode: a PNG whose pixels are cut off")
    return image


def _loaded(content: bytes, header: Header) -> Image.Image:
    if header.frame is not None and header.is_plain:
        # Without Pillow's reading of metadata, a third of the work on a small JPEG.
        mode = "L" if header.frame.num_components == 1 else "RGB"
        size = header.width, header.height
        return Image.frombytes(mode, size, content, "jpeg", mode, "")
    try:
        return _opened(content, header)
    except Exception:
        alone = _picture_alone(content, header)
        if len(alone) == len(content):
            raise
        return _opened(alone, header)


def _opened(content: bytes, header: Header) -> Image.Image:
    image = open_with_pillow(content, formats=(header.format,))
    turned = image.getexif().get(_ORIENTATION) if header.format == "TIFF" else None
    image.load()
    return image.transpose(_UNDO[turned]) if turned in _UNDO else image


def to_rgb(image: Image.Image) -> np.ndarray:
    """Convert a loaded image to uint8 (height, width, 3).

    Strip by strip: Pillow takes four bytes a pixel for RGB, beside the image's own.
    """
    width, height = image.size
    pixels = np.empty((height, width, 3), np.uint8)
    num_rows = max(_STRIP_PIXELS // width, 1)
    for top in range(0, height, num_rows):
        bottom = min(top + num_rows, height)
        whole = num_rows >= height
        strip = image if whole else image.crop((0, top, width, bottom))
        pixels[top:bottom] = _levels(strip)
    return pixels


def _levels(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I"):  # 16-bit grey: Pillow's own way would clip it
        grey = np.asarray(image).astype(np.int64).clip(0, 65535)
        # Rounds grey / 257.
        return ((grey * 255 + 32895) >> 16).astype(np.uint8)[..., None]
    if image.mode == "L":
        return np.asarray(image)[..., None]
    try:
        if image.mode in ("RGBa", "La"):  # premultiplied
            image = image.convert("RGBA" if image.mode == "RGBa" else "LA")
        return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
    except ValueError as error:
        raise BadImageError(f"does not decode: {error}") from None


def is_plain(view: np.ndarray, *, exif: Exif) -> bool:
    """Check whether DALI decodes an image to the pixels of `decode_image`.

    Raises BadImageError where the image is bad.
    """
    content = view.data
    header = read_header(content)
    if not header.is_plain or (header.format == "PNG" and not is_sound_png(content)):
        return False
    return exif == "ignore" or orientation_of(content) == 1


def as_ppm(pixels: np.ndarray) -> np.ndarray:
    """Prepend a PPM header to uint8 (height, width, 3); return uint8 (n,), lossless."""
    height, width, _ = pixels.shape
    head = np.frombuffer(b"P6 %d %d 255\n" % (width, height), np.uint8)
    return np.concatenate([head, pixels.reshape(-1)])


def stored_size(data: bytes, *, exif: Exif = "ignore") -> tuple[int, int]:
    """Read from an image's header its height and width, as `exif` turns them.

    Raises BadImageError where it is none.
    """
    content = memoryview(data)
    header = read_header(content)
    if exif == "rotate" and is_lying(orientation_of(content)):
        return header.width, header.height
    return header.height, header.width


def is_whole(data: np.ndarray | bytes) -> bool:
    """Check whether an image can be decoded."""
    try:
        load_image(data if isinstance(data, bytes) else data.tobytes())
    except BadImageError:
        return False
    return True


def _picture_alone(content: bytes, header: Header) -> bytes:
    """Leave out a PNG's texts and profiles, of which Pillow refuses large ones."""
    if header.format != "PNG":
        return content
    chunks = png_chunks(memoryview(content))
    kept = [content[s:e] for name, s, e in chunks if name in _PICTURE_CHUNKS]
    return content[:8] + b"".join(kept)


def _ends_dark(image: Image.Image) -> bool:
    last = image.getpixel((image.width - 1, image.height - 1))
    return not any(last) if isinstance(last, tuple) else not last


def _is_short(view: memoryview, *, image: Image.Image) -> bool:
    """Check whether a PNG's data end before its last row: Pillow leaves those at 0."""
    depth, color, _, _, interlace = view[24:29]
    num_bits = depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}.get(color, 1)
    rows, row_bits = image.height, image.width * num_bits
    # Interlaced rows are cut in seven passes: their pixels alone are a lower bound.
    wanted = rows * (row_bits // 8 if interlace else 1 + (row_bits + 7) // 8)
    inflate, found = zlib.decompressobj(), 0
    for name, start, end in png_chunks(view):
        data = bytes(view[start + 8 : end - 4]) if name == b"IDAT" else b""
        while data and found < wanted:
            found += len(inflate.decompress(data, _CHUNK_BYTES))
            data = inflate.unconsumed_tail
    return found < wanted


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
        if tag == _ORIENTATION and kind == _SHORT:
            (value,) = struct.unpack_from(f"{order}H", tiff, at + step - 4 - 4 * is_big)
            return value
    return 1
