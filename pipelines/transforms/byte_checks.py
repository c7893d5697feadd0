"""Check an image's bytes before a decoder does: most damage shows without decoding.

A decoder refuses a whole batch for one bad image, and a JPEG that was cut off passes
where the crop misses the hole. Here that image is found whatever its crop.
"""

from __future__ import annotations

import numpy as np

from pipelines.transforms.headers import BadImageError, read_header


def screen(encoded: np.ndarray, *, height: int, width: int) -> str:
    """Return why an image can't be decoded, or "" where its bytes look whole.

    Args:
        encoded: uint8 view of the file's bytes.
        height: Stored pixels, as the shard has them; width likewise.
    """
    try:
        header = read_header(encoded.data)
    except BadImageError as error:
        return str(error)
    if (header.height, header.width) == (height, width):
        return ""
    return (
        f"{header.format} of {header.width}x{header.height} pixels, the shard says "
        f"{width}x{height}"
    )
