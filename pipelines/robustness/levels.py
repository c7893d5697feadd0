"""Go between a model's normalised images and their uint8 levels, without a loss."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pipelines.transforms.crops import center_crop
from pipelines.transforms.normalize import Finisher
from pipelines.transforms.sampling import Draws, PixelSettings


class Levels:
    """Give the levels that images were normalised from, and normalise levels again.

    A level is a step of 1 / (255 std), a thousand times what float32 rounds by, so
    rounding gives back every level; they are normalised by what evaluation uses.
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
        """Give uint8 (B, H, W, 3) of float32 (B, 3, H, W)."""
        levels = images.permute(0, 2, 3, 1) * self._scale + self._offset
        return levels.round().to(torch.uint8).cpu().numpy()

    def normalized(self, pixels: np.ndarray) -> Tensor:
        """Give float32 (B, 3, H, W) of uint8 (B, H, W, 3), as evaluation does."""
        return self._finish(torch.from_numpy(pixels), self._draws)
