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
from nvidia.dali.pipeline import Pipeline, pipeline_def
from torch import Tensor

from pipelines.augment import Geometry
from pipelines.config import Interpolation

if TYPE_CHECKING:
    from pipelines.torch_decode import Encoded

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
        self._pipeline: Pipeline = _decode_pipeline(
            img_size=img_size,
            mean=[255 * value for value in mean],
            std=[255 * value for value in std],
            interpolation=_INTERPOLATIONS[interpolation],
            on_gpu=device.type == "cuda",
            batch_size=batch_size,
            num_threads=num_threads,
            device_id=device.index or 0 if device.type == "cuda" else None,
            prefetch_queue_depth=1,
        )
        self._pipeline.build()

    def __call__(self, encoded: Encoded, geometry: Geometry) -> Tensor:
        """Decode a batch to float32 (B, 3, img_size, img_size).

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
            return torch.from_dlpack(output.as_tensor()).clone()
        (output,) = self._pipeline.run()
        # With DALI's dynamic executor the tensor owns its memory: no copy is needed.
        return torch.from_dlpack(output.as_tensor())


@pipeline_def(exec_dynamic=True)
def _decode_pipeline(
    *,
    img_size: int,
    mean: list[float],
    std: list[float],
    interpolation: Any,
    on_gpu: bool,
) -> Any:
    encoded = fn.external_source(name="encoded", dtype=types.DALIDataType.UINT8, ndim=1)
    start = fn.external_source(name="start", dtype=types.DALIDataType.INT32, ndim=1)
    window = fn.external_source(name="window", dtype=types.DALIDataType.INT32, ndim=1)
    resized = fn.external_source(name="resized", dtype=types.DALIDataType.FLOAT, ndim=1)
    corner = fn.external_source(name="corner", dtype=types.DALIDataType.FLOAT, ndim=1)
    flip = fn.external_source(name="flip", dtype=types.DALIDataType.INT32, ndim=0)
    images = fn.decoders.image_slice(
        encoded,
        device="mixed" if on_gpu else "cpu",
        start=start,
        shape=window,
        axes=[0, 1],
        output_type=types.DALIImageType.RGB,
        # timm and torchvision do not rotate by EXIF either.
        adjust_orientation=False,
        # The CPU decoder's chroma upsampling on the GPU too.
        **({"jpeg_fancy_upsampling": True} if on_gpu else {}),
    )
    images = fn.resize(images, size=resized, interp_type=interpolation, antialias=True)
    return fn.crop_mirror_normalize(
        images,
        crop=[img_size, img_size],
        crop_pos_y=corner[0],
        crop_pos_x=corner[1],
        mirror=flip,
        mean=mean,
        std=std,
        dtype=types.DALIDataType.FLOAT,
        output_layout="CHW",
    )
