"""Compute logits as evaluation does: precision, and averaging over mirror images."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pipelines.config import Run
from pipelines.hardware.device import (
    autocast_dtype,
    is_out_of_memory,
    release_memory,
)
from pipelines.hardware.row_limit import RowLimit
from pipelines.training.fsdp import is_sharded


def autocast(
    device: torch.device, *, amp: str
) -> contextlib.AbstractContextManager[Any]:
    """Autocast to bfloat16 where `Scale.amp` asks for it and the device has it."""
    enabled = autocast_dtype(device, amp=amp) != torch.float32
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


@dataclass(frozen=True, kw_only=True)
class Forward:
    """Forward pass of evaluation, with all it depends on beside the model."""

    device: torch.device
    amp: str
    """As `Scale.amp`."""
    mirror: bool = False
    """Whether to average the logits of an image and of its mirror image."""

    @classmethod
    def of(cls, run: Run, *, device: torch.device) -> Forward:
        """Build it from a run's precision and its `data.eval_mirror`."""
        return cls(device=device, amp=run.scale.amp, mirror=run.data.eval_mirror)

    def __call__(self, model: nn.Module, images: Tensor) -> Tensor:
        """Compute the logits (B, K) of images (B, 3, H, W)."""
        with autocast(self.device, amp=self.amp):
            logits = model(images)
            if self.mirror:
                logits = (logits + model(images.flip(-1))) / 2
        return logits


@dataclass(frozen=True, kw_only=True)
class FittingForward:
    """Forward pass of as many images at a time as fit into memory.

    Each worker finds that for itself. A sharded model's error is raised as it is: the
    other workers wait for its parts.
    """

    forward: Forward
    limit: RowLimit

    def __call__(self, model: nn.Module, images: Tensor) -> Tensor:
        """Compute the logits (B, K) of images (B, 3, H, W)."""
        while (logits := self._try(model, images)) is None:
            self.limit.lower(
                len(images),
                doing="evaluation",
                advice="set a smaller --model.img-size",
            )
            release_memory(self.forward.device)
        return logits

    def _try(self, model: nn.Module, images: Tensor) -> Tensor | None:
        size = math.ceil(len(images) / self.limit.num_parts(len(images)))
        try:
            return torch.cat([self.forward(model, part) for part in images.split(size)])
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or is_sharded(model.parameters()):
                raise
            return None
