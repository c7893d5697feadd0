"""Decode with NVIDIA DALI, on the CPU or on a GPU: the only file that imports it.

DALI is stateless here: windows and flips come in as numbers (see `augment`), so a
pipeline can be rebuilt at any moment and its own random state does not exist.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import numpy as np
import nvidia.dali.fn as fn
import nvidia.dali.types as types
import torch
from nvidia.dali.pipeline import Pipeline
from torch import Tensor

from pipelines.config import Interpolation
from pipelines.ingest.augment import Geometry

if TYPE_CHECKING:
    from pipelines.ingest.torch_decode import Encoded

logger = logging.getLogger(__name__)
_INTERPOLATIONS = {
    "bilinear": types.DALIInterpType.INTERP_LINEAR,
    "bicubic": types.DALIInterpType.INTERP_CUBIC,
}


class DaliDecoder:
    """Turn encoded images into normalised tensors on the worker's device."""

    def __init__(
        self,
        *,
        batch_size: int,
        img_size: int,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        interpolation: Interpolation,
        device: torch.device,
        num_threads: int,
    ) -> None:
        self._device = device
        self._img_size = img_size
        on_gpu = device.type == "cuda"
        self._pipeline = Pipeline(
            batch_size=batch_size,
            num_threads=num_threads,
            device_id=(device.index or 0) if on_gpu else None,
            prefetch_queue_depth=1,
            exec_dynamic=True,
        )
        with self._pipeline:
            images = _images(interpolation=interpolation, on_gpu=on_gpu)
            corner = _input("corner", dtype=types.DALIDataType.FLOAT)
            normalized = fn.crop_mirror_normalize(
                images,
                crop=[img_size, img_size],
                crop_pos_y=corner[0],
                crop_pos_x=corner[1],
                mirror=_input("flip", dtype=types.DALIDataType.INT32, ndim=0),
                mean=[255 * value for value in mean],
                std=[255 * value for value in std],
                dtype=types.DALIDataType.FLOAT,
                output_layout="HWC",
            )
            self._pipeline.set_outputs(normalized)
        self._pipeline.build()

    def __call__(self, encoded: Encoded, geometry: Geometry) -> Tensor:
        """Decode a batch to float32 (B, 3, img_size, img_size), channels last.

        Raises RuntimeError where one image of the batch can't be decoded.
        """
        views = [
            item if isinstance(item, np.ndarray) else np.frombuffer(item, np.uint8)
            for item in encoded
        ]
        # The corner goes to DALI as a share of the room left, which it rounds back.
        room = np.maximum(geometry.resized - self._img_size, 1)
        feeds = {
            "encoded": views,
            "start": geometry.start.astype(np.int32),
            "window": geometry.window.astype(np.int32),
            "resized": geometry.resized.astype(np.float32),
            "corner": (geometry.crop / room).astype(np.float32),
            "flip": geometry.flip.astype(np.int32),
        }
        for name, value in feeds.items():
            self._pipeline.feed_input(name, list(value))
        if self._device.type == "cuda":
            stream = torch.cuda.current_stream(self._device)
            (output,) = self._pipeline.run(cuda_stream=stream)
            # DALI's pool does not know which streams still read a tensor; torch's does.
            return torch.from_dlpack(output.as_tensor()).clone().permute(0, 3, 1, 2)
        (output,) = self._pipeline.run()
        # With DALI's dynamic executor the tensor owns its memory: no copy is needed.
        return torch.from_dlpack(output.as_tensor()).permute(0, 3, 1, 2)


def _input(name: str, *, dtype: types.DALIDataType, ndim: int = 1) -> Any:
    return fn.external_source(name=name, dtype=dtype, ndim=ndim)


def _images(*, interpolation: Interpolation, on_gpu: bool) -> Any:
    """Decode the window of each image and resize it."""
    # The CPU's chroma upsampling on the GPU too; the CPU operator has no such choice.
    only_gpu: dict[str, Any] = {"jpeg_fancy_upsampling": True} if on_gpu else {}
    images: Any = fn.decoders.image_slice(
        _input("encoded", dtype=types.DALIDataType.UINT8),
        device="mixed" if on_gpu else "cpu",
        start=_input("start", dtype=types.DALIDataType.INT32),
        shape=_input("window", dtype=types.DALIDataType.INT32),
        axes=[0, 1],
        output_type=types.DALIImageType.RGB,
        # timm and torchvision do not rotate by EXIF either.
        adjust_orientation=False,
        **only_gpu,
    )
    return fn.resize(
        images,
        size=_input("resized", dtype=types.DALIDataType.FLOAT),
        interp_type=_INTERPOLATIONS[interpolation],
        antialias=True,
    )
