"""Build images that are bad, and odd ones that are not, by kind."""

from __future__ import annotations

import io
import struct
from typing import Any

import numpy as np
from PIL import Image

from tests.small_sets import jpeg

SIZE = (80, 60)  # width, height, of every image whose header can be read
GOOD = jpeg(3, size=SIZE)


def encode(image: Image.Image, kind: str, **settings: Any) -> bytes:
    """Encode an image with Pillow."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **settings)
    return buffer.getvalue()


def picture() -> Image.Image:
    """Draw the picture that all of them show."""
    return Image.open(io.BytesIO(GOOD)).convert("RGB")


def _with_size(data: bytes, *, height: int, width: int) -> bytes:
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + struct.pack(">HH", height, width) + data[at + 4 :]


def _with_thumbnail() -> bytes:
    """Truncate a JPEG whose header has a whole small one, end marker included."""
    small = jpeg(1)
    segment = b"\xff\xe1" + struct.pack(">H", len(small) + 2) + small
    whole = GOOD[:2] + segment + GOOD[2:]
    return whole[: len(whole) // 2 + len(segment) // 2]


def _broken_table() -> bytes:
    at = GOOD.index(b"\xff\xc4") + 5
    return GOOD[:at] + b"\xff" * 16 + GOOD[at + 16 :]


def _hole_with_forged_end() -> bytes:
    """Cut the lower half out and put an end marker there: the bytes look whole."""
    return GOOD[: len(GOOD) * 6 // 10] + b"\xff\xd9"


def bad_images() -> dict[str, bytes]:
    """Return the bad images, each to be refused alone, by kind."""
    rng = np.random.default_rng(0)
    color = picture()
    png = encode(color, "PNG")
    return {
        "no bytes": b"",
        "one byte": b"\xff",
        "HTML": b"<html><body>not found</body></html>" * 20,
        "random bytes": rng.bytes(3000),
        "20 bytes of a JPEG": GOOD[:20],
        "broken Huffman table": _broken_table(),
        "JPEG cut to 10 %": GOOD[: len(GOOD) // 10],
        "JPEG cut to 50 %": GOOD[: len(GOOD) // 2],
        "JPEG cut to 95 %": GOOD[: len(GOOD) * 95 // 100],
        "JPEG without its end": GOOD[:-2],
        "cut JPEG with a thumbnail": _with_thumbnail(),
        "JPEG of 0x0": _with_size(GOOD, height=0, width=0),
        "JPEG of 65500x65500": _with_size(GOOD, height=65500, width=65500),
        "JPEG of another size": jpeg(3, size=(40, 30)),
        "PNG cut in half": png[: len(png) // 2],
        "PNG of another size": encode(color.resize((40, 30)), "PNG"),
        "GIF": encode(color.convert("P"), "GIF"),
        "AVIF": encode(color, "AVIF"),
    }


def odd_images() -> dict[str, bytes]:
    """Return the odd images that must decode, by kind."""
    color = picture()
    rgba = color.copy()
    rgba.putalpha(128)
    images = {
        "trailing bytes": GOOD + b"more" * 50,
        "grey JPEG": encode(color.convert("L"), "JPEG"),
        "CMYK JPEG": encode(color.convert("CMYK"), "JPEG"),
        "progressive JPEG": encode(color, "JPEG", progressive=True),
        "4:4:4 JPEG": encode(color, "JPEG", subsampling=0),
        "JPEG with restarts": encode(color, "JPEG", restart_marker_rows=1),
        "PNG": encode(color, "PNG"),
        "RGBA PNG": encode(rgba, "PNG"),
        "palette PNG": encode(color.convert("P"), "PNG"),
        "grey PNG": encode(color.convert("L"), "PNG"),
        "BMP": encode(color, "BMP"),
        "TIFF": encode(color, "TIFF"),
        "PPM": encode(color, "PPM"),
        "WebP": encode(color, "WEBP", lossless=True),
        "JPEG 2000": encode(color, "JPEG2000"),
    }
    for orientation in (2, 3, 6, 8):
        exif = Image.Exif()
        exif[0x0112] = orientation
        images[f"EXIF {orientation}"] = encode(color, "JPEG", exif=exif)
    return images
