"""Decode with Pillow: DALI's twin where DALI has no wheel, and its judge in tests."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pipelines.pixels.geometry import Geometry

# What training decodes. Pillow knows more, and starts Ghostscript for some of them.
_FORMATS = ("JPEG", "JPEG2000", "TIFF", "PNG", "BMP", "PPM", "WEBP")


class PillowWindows:
    """Decode a window of each image: uint8 (height, width, 3)."""

    def __call__(
        self, encoded: Sequence[np.ndarray], geometry: Geometry
    ) -> list[Tensor]:
        """Decode windows; raises Pillow's errors where an image is bad."""
        windows = []
        for at, data in enumerate(encoded):
            # Pillow does not apply the EXIF rotation unless asked, as timm's loader.
            image = _open(data).convert("RGB")
            top, left = geometry.start[at].tolist()
            height, width = geometry.window[at].tolist()
            window = image.crop((left, top, left + width, top + height))
            windows.append(torch.from_numpy(np.array(window)))
        return windows

    def reset(self) -> None:
        """Do nothing: Pillow keeps nothing between images."""


def _open(data: np.ndarray | bytes) -> Image.Image:
    content = data if isinstance(data, bytes) else data.tobytes()
    return Image.open(io.BytesIO(content), formats=_FORMATS)


def stored_size(data: bytes) -> tuple[int, int]:
    """Read an image's stored height and width from its header."""
    width, height = _open(data).size
    return height, width


def is_whole(data: np.ndarray | bytes) -> bool:
    """Tell whether Pillow can decode an image."""
    try:
        _open(data).load()
    except Exception:  # Pillow raises OSError, SyntaxError, its own and more
        return False
    return True
