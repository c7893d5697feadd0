"""Suffixes by which a file counts as an image, decoded here or not.

A picture of a format that is not decoded is named with its reason; one whose suffix is
not here is no picture to anyone, and would be left out in silence.
"""

from __future__ import annotations

DECODED_SUFFIXES = frozenset(
    {"jpg", "jpeg", "jpe", "jfif", "mpo", "png", "apng", "webp", "bmp", "dib"}
    | {"tif", "tiff", "jp2", "j2k", "j2c", "jpc", "jpf", "jpx"}
    | {"ppm", "pgm", "pbm", "pnm"}
)
_OTHER_SUFFIXES = frozenset(
    {"gif", "avif", "heic", "heif", "hif", "jxl", "jxr", "jls", "ico", "tga", "svg"}
    | {"psd", "xcf", "exr", "hdr", "pam", "pfm", "pcx", "dng", "cr2", "cr3", "nef"}
    | {"arw", "orf", "rw2", "raf"}
)
IMAGE_SUFFIXES = DECODED_SUFFIXES | _OTHER_SUFFIXES
"""In lower case, without the dot."""


def is_picture_name(name: str) -> bool:
    """Check whether a file's name ends as a picture's, in either case."""
    _, dot, suffix = name.rpartition(".")
    return bool(dot) and suffix.lower() in IMAGE_SUFFIXES
