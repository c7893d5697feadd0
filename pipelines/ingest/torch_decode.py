"""Decode with Pillow into torch tensors: DALI's twin where DALI has no wheel.

The same contract as `pipelines.ingest.dali`, and the reference for its tests.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pipelines.config import Data, Interpolation
from pipelines.ingest.augment import Geometry, center_crop

_RESAMPLING = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}
Encoded = Sequence[np.ndarray] | Sequence[bytes]


class TorchDecoder:
    """Turn encoded images into normalised tensors on the CPU, then on a device."""

    def __init__(
        self,
        *,
        img_size: int,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        interpolation: Interpolation,
        device: torch.device,
    ) -> None:
        self._img_size = img_size
        self._resampling = _RESAMPLING[interpolation]
        self._device = device
        self._mean = torch.tensor(mean, device=device).view(1, 3, 1, 1) * 255
        self._std = torch.tensor(std, device=device).view(1, 3, 1, 1) * 255

    def __call__(self, encoded: Encoded, geometry: Geometry) -> Tensor:
        """Decode a batch to float32 (B, 3, img_size, img_size), channels last."""
        pixels = np.stack(
            [self._image(data, geometry, at) for at, data in enumerate(encoded)]
        )
        images = torch.from_numpy(pixels).to(self._device).permute(0, 3, 1, 2)
        return (images.float() - self._mean) / self._std

    def _image(
        self, data: np.ndarray | bytes, geometry: Geometry, at: int
    ) -> np.ndarray:
        # Pillow does not apply the EXIF rotation unless asked, as timm's loader.
        image = _open(data).convert("RGB")
        top, left = geometry.start[at].tolist()
        height, width = geometry.window[at].tolist()
        window = image.crop((left, top, left + width, top + height))
        new_height, new_width = geometry.resized[at].tolist()
        window = window.resize((new_width, new_height), self._resampling)
        top, left = geometry.crop[at].tolist()
        size = self._img_size
        pixels = np.asarray(window.crop((left, top, left + size, top + size)))
        return pixels[:, ::-1] if geometry.flip[at] else pixels


def _open(data: np.ndarray | bytes) -> Image.Image:
    return Image.open(io.BytesIO(data if isinstance(data, bytes) else data.tobytes()))


def find_damaged(encoded: Encoded) -> int | None:
    """Find the first image that can't be decoded; None where all can."""
    for at, data in enumerate(encoded):
        try:
            _open(data).load()
        except Exception:  # Pillow raises OSError, SyntaxError, its own and more
            return at
    return None


def decode_eval(encoded: Encoded, *, data: Data, img_size: int) -> Tensor:
    """Decode images for evaluation: float32 (B, 3, img_size, img_size) on the CPU."""
    sizes = np.array([_open(item).size for item in encoded])
    decoder = TorchDecoder(
        img_size=img_size,
        mean=data.mean,
        std=data.std,
        interpolation=data.eval_interpolation,
        device=torch.device("cpu"),
    )
    geometry = center_crop(
        heights=sizes[:, 1],
        widths=sizes[:, 0],
        img_size=img_size,
        crop_pct=data.crop_pct,
    )
    return decoder(encoded, geometry)
