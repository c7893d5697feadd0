"""Check which damaged images a bare decoder refuses, and which come out as grey blocks.

What a training makes of them `pytest -m gpu` checks.
"""

from __future__ import annotations

import functools
import io

import numpy as np
from PIL import Image

from benchmarks.on_gpu.pixels import BareDecoder, distance
from benchmarks.on_gpu.setting import Setting, Tasks
from benchmarks.rounds import Record
from tests.odd_images import bad_images, odd_images

# Too many pixels to ask a decoder for where nothing screens them.
_TOO_LARGE = "JPEG of 65500x65500"
_ENGINES = (1.0, 0.0)


def tasks(setting: Setting) -> Tasks:
    """Try each bad image, then each odd one that must decode."""
    decoders: dict[float, BareDecoder] = {}
    named = {
        f"{kind}: {name}": functools.partial(_ask, setting, image, decoders=decoders)
        for kind, images in (("bad", bad_images()), ("odd", odd_images()))
        for name, image in images.items()
        if name != _TOO_LARGE
    }
    return dict(list(named.items())[:: setting.pick(1, tiny=8)])


def _ask(
    setting: Setting, image: bytes, *, decoders: dict[float, BareDecoder]
) -> Record:
    """Report by engine whether an image is refused, or how far from Pillow's it is."""
    found = {}
    for hardware in _ENGINES:
        # One that refused an image is not used again.
        decode = decoders.pop(hardware, None) or BareDecoder(
            setting, batch_size=1, hardware=hardware
        )
        try:
            (pixels,) = decode.arrays([image])
            decoders[hardware] = decode
            said = f"passes, {_flat_share(pixels):.0%} flat, {_apart(pixels, image)}"
        except RuntimeError:
            said = "refuses it"
        found[f"engine_{hardware:.0f}"] = said
    return found


def _flat_share(pixels: np.ndarray) -> float:
    """Compute the share of single-colour 8x8 blocks: what was never decoded."""
    height, width = (side // 8 * 8 for side in pixels.shape[:2])
    if not height or not width:
        return 0.0
    blocks = pixels[:height, :width].reshape(height // 8, 8, width // 8, 8, 3)
    spread = blocks.max(axis=(1, 3)).astype(int) - blocks.min(axis=(1, 3))
    return float((spread.max(axis=-1) == 0).mean())


def _apart(pixels: np.ndarray, image: bytes) -> str:
    try:
        wanted = np.asarray(Image.open(io.BytesIO(image)).convert("RGB"))
    except Exception as error:  # Pillow has many
        return f"Pillow refuses it: {type(error).__name__}"
    if wanted.shape != pixels.shape:
        return f"of another shape than Pillow's: {pixels.shape}, {wanted.shape}"
    return f"mean distance to Pillow {distance([pixels], [wanted])['mean']:.2f}"
