"""Find JPEGs whose scan is damaged though they end as they should.

Where a scan ends early, decoders fill the rest with grey and say nothing: libjpeg,
so Pillow and DALI on a CPU, and the JPEG engines of GPUs. A whole scan decodes to the
same pixels whatever follows it, one that ends early does not.
"""

from __future__ import annotations

import hashlib
import re

import numpy as np
from PIL import Image

from pipelines.transforms.headers import (
    PROGRESSIVE,
    BadImageError,
    JpegFrame,
)
from pipelines.transforms.pillow_decode import load_image

_END_OF_IMAGE, _START_OF_SCAN = b"\xff\xd9", b"\xff\xda"
_RESTART = re.compile(rb"\xff[\xd0-\xd7]")
_GREY = 128
# Any bytes without a marker.
_FILLER = hashlib.shake_256(b"scan").digest(400).replace(b"\xff", b"\0")


def check_scans(content: bytes, *, frame: JpegFrame, image: Image.Image) -> None:
    """Check that a JPEG's scan holds all of its blocks.

    Not found: less than the last block, and flipped bits, which are pixels to anyone. A
    progressive JPEG that ends early is a coarser picture, which nothing is grey in.

    Args:
        content: Its bytes, which decode.
        frame: What its header says.
        image: What they decode to.

    Raises:
        BadImageError: They do not.
    """
    has_restarts = frame.restart_interval > 0
    if not frame.is_plain or frame.marker == PROGRESSIVE:
        return
    ends_grey = _ends_grey(image)
    if not (has_restarts or ends_grey):
        return
    at = content.find(_END_OF_IMAGE, frame.scan_start)
    if has_restarts and _lacks_restarts(content[:at], frame=frame):
        raise BadImageError(
            "does not decode: a JPEG with a hole, restart markers are missing"
        )
    if not ends_grey:
        return
    other = load_image(content[:at] + _FILLER + content[at:])
    if not np.array_equal(np.asarray(other), np.asarray(image)):
        raise BadImageError(
            "does not decode: a JPEG whose scan is cut short, its end-of-image marker "
            "notwithstanding"
        )


def _lacks_restarts(content: bytes, *, frame: JpegFrame) -> bool:
    scan = content[frame.scan_start :]
    if not frame.restart_interval or _START_OF_SCAN in scan:
        return False
    num = content[frame.frame_start + 9]
    factors = content[frame.frame_start + 11 : frame.frame_start + 11 + 3 * num : 3]
    # One component is cut into blocks of 8x8, whatever its factors say.
    across = 8 * (max(f >> 4 for f in factors) if num > 1 else 1)
    down = 8 * (max(f & 15 for f in factors) if num > 1 else 1)
    num_blocks = -(-frame.width // across) * -(-frame.height // down)
    wanted = -(-num_blocks // frame.restart_interval) - 1
    return len(_RESTART.findall(scan)) < wanted


def _ends_grey(image: Image.Image) -> bool:
    last = image.getpixel((image.width - 1, image.height - 1))
    levels = last if isinstance(last, tuple) else (last,)
    return all(abs(float(level or 0) - _GREY) <= 1 for level in levels)
