"""Check an image as training will read it, and re-encode oversized ones."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass

from PIL import Image

from pipelines.shards.jpeg_scans import check_scans
from pipelines.transforms.headers import BadImageError, read_header
from pipelines.transforms.pillow_decode import load_image, orientation_of, to_rgb

__all__ = ["BadImageError", "Checked", "check_image"]
_ORIENTATION = 0x0112
_MAX_JPEG_SIDE = 65500  # libjpeg's


@dataclass(frozen=True)
class Checked:
    """Image that decodes: its bytes, and its stored size before any rotation."""

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
        BadImageError: Training, evaluation and prediction would refuse these bytes.
    """
    with warnings.catch_warnings():
        # Pillow warns of odd metadata; what matters is whether the pixels decode.
        warnings.simplefilter("ignore")
        header = read_header(memoryview(data))
        width, height = header.width, header.height
        orientation = orientation_of(memoryview(data)) if short_side else 1
        shrinks = short_side is not None and min(width, height) > short_side
        # Programs do not agree on how a turned TIFF is stored: leave it as it is.
        shrinks = shrinks and not (header.format == "TIFF" and orientation != 1)
        if full or shrinks:
            image = load_image(data, header=header)
            if full and header.frame is not None:
                check_scans(data, frame=header.frame, image=image)
            if short_side is not None and shrinks:
                is_rgb = image.mode == "RGB"
                return _shrink(
                    image if is_rgb else Image.fromarray(to_rgb(image)),
                    short_side=short_side,
                    quality=quality,
                    orientation=orientation,
                )
        return Checked(data, width=width, height=height)


def _shrink(
    image: Image.Image, *, short_side: int, quality: int, orientation: int
) -> Checked:
    scale = short_side / min(image.size)
    size = (round(image.width * scale), round(image.height * scale))
    if max(size) > _MAX_JPEG_SIDE:
        raise BadImageError(
            f"{image.width}x{image.height} pixels, {size[0]}x{size[1]} of them at a "
            f"short side of {short_side}, are more than a JPEG holds, {_MAX_JPEG_SIDE} "
            "a side: cut it into pieces"
        )
    small = image.resize(size, Image.Resampling.BICUBIC)
    exif = Image.Exif()
    if orientation != 1:
        exif[_ORIENTATION] = orientation
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=quality, exif=exif)
    return Checked(buffer.getvalue(), width=size[0], height=size[1])
