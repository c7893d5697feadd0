"""Finish a batch on the worker's device: normalise, then erase; and the way back."""

from __future__ import annotations

import sys
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from pipelines.config import PixelSettings
from pipelines.hardware.device import is_gpu, upload
from pipelines.transforms.cpu import Threads
from pipelines.transforms.erasing import Boxes, erase


class Finisher:
    """Converter of uint8 pixels (n, H, W, 3) to floats (n, 3, H, W), channels last.

    Args:
        dtype: What the images are rounded to, once, from float32: bfloat16 comes out
            as if float32 had been cast.
    """

    def __init__(
        self,
        settings: PixelSettings,
        *,
        device: torch.device,
        num_threads: int,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        size = settings.img_size
        mean = 255 * np.array(settings.data.mean)
        std = 255 * np.array(settings.data.std)
        # One number a channel, or on the CPU one a value of an image: a plain
        # elementwise pass over memory is several times as fast as a broadcast one.
        num_pixels = 1 if is_gpu(device) else size * size
        self._scale = _tiled(1 / std, num_pixels, device=device)
        self._offset = _tiled(-mean / std, num_pixels, device=device)
        self._mode: Literal["const", "rand", "pixel"] = settings.augment.re_mode
        self._device, self._dtype = device, dtype
        self._threads = Threads(num_threads)
        self._lent: list[np.ndarray] = []

    def __call__(self, pixels: Tensor, *, boxes: Boxes | None = None) -> Tensor:
        """Normalise, and erase boxes where some were drawn."""
        if is_gpu(self._device):
            # Pixels that the readers decoded are still on the host.
            normalized = self._on_gpu(upload(pixels, self._device))
        else:
            normalized = self._on_cpu(pixels).to(self._dtype)
        images = normalized.permute(0, 3, 1, 2)
        if boxes is not None:
            images = erase(images, boxes, mode=self._mode)
        return images

    def _on_gpu(self, pixels: Tensor) -> Tensor:
        # One kernel: it computes in float32 and rounds as it writes.
        out = torch.empty(pixels.shape, dtype=self._dtype, device=pixels.device)
        return torch.addcmul(self._offset, pixels, self._scale, out=out)

    def _on_cpu(self, pixels: Tensor) -> Tensor:
        normalized = self._buffer(tuple(pixels.shape))
        flat, out = pixels.flatten(1), normalized.flatten(1)

        def finish(at: int) -> None:
            values = flat[at].float()
            torch.addcmul(self._offset, values, self._scale, out=out[at])

        self._threads.each(finish, num=len(pixels))
        return normalized

    def _buffer(self, shape: tuple[int, ...]) -> Tensor:
        """Return a float32 tensor with arbitrary content, one that is free again.

        Fresh memory costs a page fault every 4 kB: a quarter of a millisecond an image
        of 224x224, a fifth of all its work.
        """
        self._lent = [array for array in self._lent if array.shape == shape]
        for array in self._lent:
            # A tensor refers to its array until the last view of it is gone. These two
            # are this loop's and the list's; the third is the call's own.
            if sys.getrefcount(array) == 3:
                return torch.from_numpy(array)
        array = np.empty(shape, np.float32)
        self._lent.append(array)
        return torch.from_numpy(array)


def _tiled(values: np.ndarray, num_pixels: int, *, device: torch.device) -> Tensor:
    tiled = np.tile(values.astype(np.float32), num_pixels)
    return torch.from_numpy(tiled).to(device)


class Levels:
    """Lossless conversion between normalised images and their uint8 levels.

    A level is a step of 1 / (255 std), a thousand times float32's rounding error, so
    rounding recovers every level; they are normalised by what evaluation uses.
    """

    def __init__(
        self, settings: PixelSettings, *, device: torch.device, num_threads: int
    ) -> None:
        data = settings.data
        self.img_size = settings.img_size
        self._scale = 255 * torch.tensor(data.std, device=device)
        self._offset = 255 * torch.tensor(data.mean, device=device)
        self._finish = Finisher(settings, device=device, num_threads=num_threads)

    def of(self, images: Tensor) -> np.ndarray:
        """Convert float32 (B, 3, H, W) to uint8 (B, H, W, 3)."""
        levels = images.permute(0, 2, 3, 1) * self._scale + self._offset
        return levels.round().to(torch.uint8).cpu().numpy()

    def normalized(self, pixels: np.ndarray) -> Tensor:
        """Normalise uint8 (B, H, W, 3) to float32 (B, 3, H, W), as evaluation does."""
        return self._finish(torch.from_numpy(pixels))
