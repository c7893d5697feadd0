"""Convert between a model's normalised images and their uint8 levels, losslessly."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pipelines.transforms.crops import center_crop
from pipelines.transforms.normalize import Finisher
from pipelines.transforms.sampling import Draws, PixelSettings


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
        # Evaluation's: nothing of it is read but that nothing is erased.
        whole = np.array([settings.img_size])
        geometry = center_crop(
            heights=whole,
            widths=whole,
            img_size=settings.img_size,
            crop_pct=1.0,
            interpolation=data.eval_interpolation,
        )
        self._draws = Draws(geometry=geometry, ops=None, boxes=None)

    def of(self, images: Tensor) -> np.ndarray:
        """Convert float32 (B, 3, H, W) to uint8 (B, H, W, 3)."""
        levels = images.permute(0, 2, 3, 1) * self._scale + self._offset
        return levels.round().to(torch.uint8).cpu().numpy()

    def normalized(self, pixels: np.ndarray) -> Tensor:
        """Normalise uint8 (B, H, W, 3) to float32 (B, 3, H, W), as evaluation does."""
        return self._finish(torch.from_numpy(pixels), self._draws)
