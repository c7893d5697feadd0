"""Make pixels on the CPU: decode windows, resize, flip, augment.

The decoder gives windows, from DALI or Pillow, which agree bit for bit on JPEGs. The
resize is torch's antialiased one for uint8, within a level of Pillow's and three times
as fast; DALI's own takes as long as its decoding. The operations are timm's, on Pillow.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipelines.config import Exif
from pipelines.transforms.crops import Geometry
from pipelines.transforms.pillow_decode import as_ppm, decode_image, is_plain
from pipelines.transforms.pillow_ops import apply_ops
from pipelines.transforms.sampling import Draws

# Small enough for threads to end together, large enough not to be felt.
_PARTS_PER_THREAD = 4
Windows = Callable[[Sequence[np.ndarray], Geometry], list[Tensor]]
"""Decodes a window of each image: uint8 (height, width, 3)."""


class HostDecoder:
    """CPU decoder of encoded images to uint8 pixels (n, img_size, img_size, 3)."""

    num_ahead = 0
    """Batches worth starting before the first one is asked for."""

    def __init__(
        self,
        windows: Windows,
        *,
        img_size: int,
        fill: tuple[int, int, int],
        num_threads: int,
    ) -> None:
        self._windows = windows
        self._img_size = img_size
        self._fill = fill
        self._threads = Threads(num_threads)

    def __call__(self, encoded: Sequence[np.ndarray], draws: Draws) -> Tensor:
        """Decode a batch; a bad image raises the error of `windows`."""
        windows = self._windows(encoded, draws.geometry)
        size = self._img_size
        pixels = np.empty((len(windows), size, size, 3), np.uint8)

        def finish(at: int) -> None:
            pixels[at] = self._pixels(windows[at], draws, at)

        self._threads.each(finish, num=len(windows))
        return torch.from_numpy(pixels)

    def start(
        self, encoded: Sequence[np.ndarray], draws: Draws
    ) -> Callable[[], Tensor]:
        """Return a deferred decode: on the CPU there is nothing to overlap it with."""
        return functools.partial(self, encoded, draws)

    def _pixels(self, window: Tensor, draws: Draws, at: int) -> np.ndarray:
        geometry, size = draws.geometry, self._img_size
        # The unusual order keeps the strides of channels last, which resize fastest.
        image = window[None].permute(0, 3, 1, 2)
        wanted = geometry.resized[at].tolist()
        if list(image.shape[2:]) != wanted:
            mode = "bicubic" if geometry.bicubic[at] else "bilinear"
            image = F.interpolate(image, wanted, mode=mode, antialias=True)
        top, left = geometry.crop[at].tolist()
        image = image[0, :, top : top + size, left : left + size]
        if geometry.flip[at]:
            image = image.flip(2)
        pixels = image.permute(1, 2, 0).numpy()
        if draws.ops is None:
            return pixels
        return apply_ops(
            pixels,
            ids=draws.ops.ids[at],
            args=draws.ops.args[at],
            bicubic=draws.ops.bicubic[at],
            fill=self._fill,
        )


class Threads:
    """Thread pool that calls a function for every place of a batch."""

    def __init__(self, num_threads: int) -> None:
        self._num_threads = num_threads
        self._pool = ThreadPoolExecutor(num_threads) if num_threads > 1 else None

    def each(self, function: Callable[[int], None], *, num: int) -> None:
        """Call `function` with 0 to num - 1, in any order; raises its first error."""
        if self._pool is None:
            for at in range(num):
                function(at)
            return
        num_parts = self._num_threads * _PARTS_PER_THREAD

        def do_part(part: int) -> None:
            for at in range(num * part // num_parts, num * (part + 1) // num_parts):
                function(at)

        list(self._pool.map(do_part, range(num_parts)))


def plain_views(
    encoded: Sequence[np.ndarray], *, exif: Exif, threads: Threads
) -> list[np.ndarray]:
    """Exchange images that DALI decodes differently for the judge's pixels.

    Raises BadImageError where one of those is bad.
    """
    views = list(encoded)
    odd = [at for at in range(len(views)) if not is_plain(views[at], exif=exif)]

    def replace(place: int) -> None:
        at = odd[place]
        views[at] = as_ppm(decode_image(views[at].tobytes(), exif=exif))

    threads.each(replace, num=len(odd))
    return views
