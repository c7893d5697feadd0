"""Decode with NVIDIA DALI, on the CPU or on a GPU.

DALI is stateless here: windows, flips and operations come in as numbers (see `draws`),
so a pipeline can be rebuilt at any moment and its own random state does not exist.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import nvidia.dali.fn as fn
import nvidia.dali.types as types
import torch
from nvidia.dali.pipeline import Pipeline, pipeline_def
from torch import Tensor

from pipelines.pixels.dali_ops import apply_ops, op_inputs
from pipelines.pixels.draws import Draws, PixelSettings
from pipelines.pixels.geometry import Geometry

_INT32, _FLOAT = types.DALIDataType.INT32, types.DALIDataType.FLOAT


def current_stream(device: torch.device) -> torch.cuda.Stream | None:
    """Return the stream that a device's outputs are read on; None on a CPU.

    DALI's `run` and `outputs` take either, so that there is one path for both.
    """
    return torch.cuda.current_stream(device) if device.type == "cuda" else None


class DaliWindows:
    """Decode a window of each image on the CPU: uint8 (height, width, 3)."""

    def __init__(self, *, batch_size: int, num_threads: int) -> None:
        self._batch_size = batch_size
        self._num_threads = num_threads
        self.reset()

    def __call__(
        self, encoded: Sequence[np.ndarray], geometry: Geometry
    ) -> list[Tensor]:
        """Decode windows; raises RuntimeError where one image of the batch is bad."""
        _feed(self._pipeline, encoded, geometry)
        (output,) = self._pipeline.run()
        # With DALI's dynamic executor a tensor owns its memory: no copy is needed.
        return [torch.from_dlpack(output[at]) for at in range(len(encoded))]

    def reset(self) -> None:
        """Build the pipeline anew: 20 to 45 ms."""
        self._pipeline = Pipeline(
            batch_size=self._batch_size,
            num_threads=self._num_threads,
            device_id=None,
            prefetch_queue_depth=1,
            exec_dynamic=True,
        )
        with self._pipeline:
            self._pipeline.set_outputs(_decoded_windows(device="cpu"))
        self._pipeline.build()


class DaliDecoder:
    """Turn encoded images into uint8 pixels (n, img_size, img_size, 3) on a GPU.

    The same work as `HostDecoder` on the CPU, by DALI's own operators; `dali_ops` says
    where their pixels differ.

    Args:
        device: A CUDA device. On the CPU, where tests run it, it is slower than
            HostDecoder.
    """

    def __init__(
        self, settings: PixelSettings, *, batch_size: int, device: torch.device
    ) -> None:
        self._settings = settings
        self._batch_size = batch_size
        self._device = device
        self.reset()

    def __call__(self, encoded: Sequence[np.ndarray], draws: Draws) -> Tensor:
        """Decode a batch; raises RuntimeError where one image of it is bad."""
        geometry = draws.geometry
        _feed(self._pipeline, encoded, geometry)
        feeds = {
            "resized": geometry.resized.astype(np.float32),
            "interpolation": _interpolations(geometry.bicubic),
            "crop": geometry.crop.astype(np.int32),
            "flip": geometry.flip.astype(np.int32),
        }
        if draws.ops is not None:
            feeds |= op_inputs(draws.ops, img_size=self._settings.img_size)
        for name, value in feeds.items():
            # A whole array, which is a batch too: a list costs twenty times as long.
            self._pipeline.feed_input(name, np.ascontiguousarray(value))
        # Positional only: by name DALI takes it for one more input of the graph.
        (output,) = self._pipeline.run(current_stream(self._device))
        # DALI's pool does not know which streams still read a tensor; torch's does.
        return torch.from_dlpack(output.as_tensor()).clone()

    def reset(self) -> None:
        """Build the pipeline anew."""
        on_gpu = self._device.type == "cuda"
        make: Any = pipeline_def
        define = make(
            batch_size=self._batch_size,
            num_threads=self._settings.data.num_decode_threads,
            device_id=(self._device.index or 0) if on_gpu else None,
            prefetch_queue_depth=1,
            exec_dynamic=True,
            # Each image goes through its own operations only.
            enable_conditionals=True,
        )
        self._pipeline = define(_pixels)(self._settings, on_gpu=on_gpu)
        self._pipeline.build()


def _pixels(settings: PixelSettings, *, on_gpu: bool) -> Any:
    """Define the graph: decode, resize, crop, flip, augment."""
    data = settings.data
    load = 0.0 if data.deterministic else data.hw_decoder_load
    images: Any = fn.resize(
        _decoded_windows(device="mixed" if on_gpu else "cpu", hw_decoder_load=load),
        size=_input("resized", dtype=_FLOAT),
        interp_type=fn.cast(
            _input("interpolation", dtype=_INT32, ndim=0),
            dtype=types.DALIDataType.INTERP_TYPE,
        ),
        antialias=True,
    )
    shape = (settings.img_size, settings.img_size)
    corner = _input("crop", dtype=_INT32)
    images = fn.slice(images, start=corner, shape=shape, axes=(0, 1))
    images = fn.flip(images, horizontal=_input("flip", dtype=_INT32, ndim=0))
    if settings.num_ops > 0:
        images = apply_ops(
            images,
            num_columns=settings.num_ops,
            img_size=settings.img_size,
            fill=settings.fill,
        )
    return images


def _feed(
    pipeline: Pipeline, encoded: Sequence[np.ndarray], geometry: Geometry
) -> None:
    pipeline.feed_input("encoded", list(encoded))
    pipeline.feed_input("start", geometry.start.astype(np.int32))
    pipeline.feed_input("window", geometry.window.astype(np.int32))


def _input(name: str, *, dtype: types.DALIDataType, ndim: int = 1) -> Any:
    return fn.external_source(name=name, dtype=dtype, ndim=ndim)


def _decoded_windows(*, device: str, hw_decoder_load: float = 0.0) -> Any:
    # The CPU's chroma upsampling on the GPU too; the CPU operator has no such choice.
    only_gpu: dict[str, Any] = {
        "jpeg_fancy_upsampling": True,
        "hw_decoder_load": hw_decoder_load,
    }
    return fn.decoders.image_slice(
        # A view keeps its bytes alive until they are decoded: they need no copy.
        fn.external_source(
            name="encoded", dtype=types.DALIDataType.UINT8, ndim=1, no_copy=True
        ),
        device=device,
        start=_input("start", dtype=_INT32),
        shape=_input("window", dtype=_INT32),
        axes=[0, 1],
        output_type=types.DALIImageType.RGB,
        # timm and torchvision do not rotate by EXIF either.
        adjust_orientation=False,
        **(only_gpu if device == "mixed" else {}),
    )


def _interpolations(bicubic: np.ndarray) -> np.ndarray:
    kinds: Any = types.DALIInterpType
    cubic, linear = int(kinds.INTERP_CUBIC), int(kinds.INTERP_LINEAR)
    return np.where(bicubic, cubic, linear).astype(np.int32)
