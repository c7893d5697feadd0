"""Check which damaged images are detected, and which decode to grey blocks."""

from __future__ import annotations

import functools
import io

import numpy as np
from PIL import Image

from benchmarks.on_gpu.pixels import BareDecoder, distance, settings_of
from benchmarks.on_gpu.setting import Figures, Setting, Tasks, rows_of
from pipelines.transforms.byte_checks import screen
from pipelines.transforms.decoder import BatchDecoder
from tests.odd_images import SIZE, bad_images, odd_images

# Too many pixels to ask a decoder for where nothing screens them.
_TOO_LARGE = frozenset({"bad: JPEG of 65500x65500"})
_ENGINES = (1.0, 0.0)


def tasks(setting: Setting) -> Tasks:
    """Try each bad image, then each odd one that must decode."""
    named = [
        (f"{kind}: {name}", image)
        for kind, images in (("bad", bad_images()), ("odd", odd_images()))
        for name, image in images.items()
    ]
    chosen = named[:: setting.pick(1, tiny=8)]
    judge = Judge(setting)
    return {
        name: functools.partial(judge, number, name, image)
        for number, (name, image) in enumerate(chosen)
    }


class Judge:
    """Try an image on the whole decoding path, and on bare decoders."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self._bare: dict[float, BareDecoder] = {}

    def __call__(self, number: int, name: str, image: bytes) -> Figures:
        """Report whether the bytes' screen, training and bare decoders refuse it."""
        rows = rows_of([image], sizes=[SIZE], first=number)
        bad = self._whole(rows, 0).bad
        found = {
            "screen": screen(rows.views[0], height=SIZE[1], width=SIZE[0]) or "passes",
            "training": f"left out: {bad[0].reason}" if bad else "takes it",
        }
        if name not in _TOO_LARGE:
            for hardware in _ENGINES:
                found[f"engine_{hardware:.0f}"] = self._ask(image, hardware)
        return found

    @functools.cached_property
    def _whole(self) -> BatchDecoder:
        # Evaluation's window is most of the image.
        settings = settings_of(self._setting, train=False)
        return BatchDecoder(settings, num_rows=1, device=self._setting.device)

    def _ask(self, image: bytes, hardware: float) -> str:
        # One that refused an image is not used again.
        decode = self._bare.pop(hardware, None) or BareDecoder(
            self._setting, batch_size=1, hardware=hardware
        )
        try:
            (pixels,) = decode.arrays([image])
        except RuntimeError:
            return "refuses it"
        self._bare[hardware] = decode
        return f"passes, {_flat_share(pixels):.0%} flat, {_apart(pixels, image)}"


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
