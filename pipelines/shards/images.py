"""Decides whether DALI will decode an image, and re-encodes the ones too large."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass

import numpy as np
from PIL import Image, UnidentifiedImageError

# What DALI 2.4 decodes, in Pillow's names; MPO is a JPEG with a second picture behind.
FORMATS = frozenset(
    {"JPEG", "MPO", "JPEG2000", "TIFF", "PNG", "BMP", "PPM", "WEBP"},
)
ORIENTATION = 0x0112
TIFF_WIDTH, TIFF_HEIGHT = 256, 257


class BadImageError(ValueError):
    """The bytes are not an image that training could decode; the text says why."""


@dataclass(frozen=True)
class Checked:
    """An image that decodes: its bytes, and its stored pixels before any rotation."""

    data: bytes
    width: int
    height: int


def check_image(
    data: bytes,
    *,
    full: bool = True,
    short_side: int | None = None,
    quality: int = 90,
) -> Checked:
    """Check that an image decodes, and shrink it if asked.

    Args:
        data: The file's bytes. They are given back as they are unless it is shrunk.
        full: Decode all of it, which finds every truncation. Otherwise only the header
            is read, and a JPEG must hold its end marker.
        short_side: Re-encode as RGB JPEG where the shorter side has more pixels.
        quality: JPEG quality of those.

    Raises:
        BadImageError: DALI would refuse these bytes.
    """
    if not data:
        raise BadImageError("empty file")
    with warnings.catch_warnings():
        # Pillow warns of odd metadata; what matters is whether the pixels decode.
        warnings.simplefilter("ignore")
        image = _open(data)
        width, height = _stored_size(image)
        shrinks = short_side is not None and min(width, height) > short_side
        shrinks = shrinks and not _turned_by_pillow(image)
        if full or shrinks:
            _decode(image)
        elif image.format in ("JPEG", "MPO") and b"\xff\xd9" not in data[2:]:
            raise BadImageError("does not decode: no end-of-image marker")
        if short_side is None or not shrinks:
            return Checked(data, width=width, height=height)
        return _shrink(image, short_side=short_side, quality=quality)


def _open(data: bytes) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(data))
    except UnidentifiedImageError:
        raise BadImageError("not an image in a known format") from None
    except Exception as error:  # Pillow's readers raise anything on broken headers.
        raise BadImageError(f"broken header: {error}") from None
    if image.format not in FORMATS:
        raise BadImageError(f"format {image.format} is not decoded by DALI")
    # DALI refuses 32-bit integers and PFM, and clips floats to another picture.
    is_wide = image.mode == "F" or (image.mode == "I" and image.format == "TIFF")
    if is_wide:
        raise BadImageError(
            f"{image.format} of 32-bit samples is not decoded rightly by DALI"
        )
    return image


def _decode(image: Image.Image) -> None:
    try:
        image.load()
    except Exception as error:  # As above: OSError, SyntaxError, struct.error, ...
        raise BadImageError(f"does not decode: {error}") from None


def _stored_size(image: Image.Image) -> tuple[int, int]:
    tags = getattr(image, "tag_v2", None)
    if image.format == "TIFF" and tags is not None:  # Pillow's size is the turned one.
        return int(tags[TIFF_WIDTH]), int(tags[TIFF_HEIGHT])
    return image.size


def _turned_by_pillow(image: Image.Image) -> bool:
    # Pillow turns the pixels of such a TIFF as it decodes them: leave it as it is.
    tags = getattr(image, "tag_v2", {})
    return image.format == "TIFF" and tags.get(ORIENTATION, 1) != 1


def _shrink(image: Image.Image, *, short_side: int, quality: int) -> Checked:
    orientation = image.getexif().get(ORIENTATION, 1)
    scale = short_side / min(image.size)
    size = (round(image.width * scale), round(image.height * scale))
    small = _to_rgb(image).resize(size, Image.Resampling.BICUBIC)
    exif = Image.Exif()
    if orientation != 1:
        exif[ORIENTATION] = orientation
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=quality, exif=exif)
    return Checked(buffer.getvalue(), width=size[0], height=size[1])


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey: convert() would clip, DALI scales.
        pixels = np.asarray(image).astype(np.float64) / 257
        image = Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))
    return image.convert("RGB")
