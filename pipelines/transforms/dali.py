"""Decode with NVIDIA DALI, on the CPU or on a GPU.

DALI is stateless here: windows, flips and operations come in as numbers, see
`sampling`. So a pipeline can be rebuilt at any moment and has no random state.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import nvidia.dali.fn as fn
import nvidia.dali.types as types
import torch
from nvidia.dali.pipeline import Pipeline, pipeline_def
from torch import Tensor

from pipelines.config import Exif, PixelSettings
from pipelines.hardware.device import current_stream, is_gpu
from pipelines.transforms.cpu import Threads, plain_views
from pipelines.transforms.crops import Geometry
from pipelines.transforms.dali_ops import apply_ops, op_inputs
from pipelines.transforms.headers import BadImageError
from pipelines.transforms.sampling import Draws

_INT32, _FLOAT = types.DALIDataType.INT32, types.DALIDataType.FLOAT


class DaliWindows:
    """DALI decoder of a window of each image on the CPU: uint8 (height, width, 3)."""

    def __init__(
        self, *, batch_size: int, num_threads: int, exif: Exif = "ignore"
    ) -> None:
        self._batch_size = batch_size
        self._num_threads = num_threads
        self._exif: Exif = exif
        self._threads = Threads(num_threads)
        self._pipeline = self._build()

    def __call__(
        self, encoded: Sequence[np.ndarray], geometry: Geometry
    ) -> list[Tensor]:
        """Decode windows; raises RuntimeError where one image of the batch is bad."""
        views = plain_views(encoded, exif=self._exif, threads=self._threads)
        try:
            _feed(self._pipeline, views, geometry)
            (output,) = self._pipeline.run()
        except Exception:  # DALI may not go on after one
            self._pipeline = self._build()
            raise
        # With DALI's dynamic executor a tensor owns its memory: no copy is needed.
        return [torch.from_dlpack(output[at]) for at in range(len(encoded))]

    def _build(self) -> Pipeline:
        """Build the pipeline: 20 to 45 ms."""
        pipeline = Pipeline(
            batch_size=self._batch_size,
            num_threads=self._num_threads,
            device_id=None,
            prefetch_queue_depth=1,
            exec_dynamic=True,
        )
        with pipeline:
            pipeline.set_outputs(_decoded_windows(device="cpu"))
        pipeline.build()
        return pipeline


@dataclass(frozen=True, kw_only=True, eq=False)
class _Batch:
    """Images submitted for decoding, and their result."""

    encoded: Sequence[np.ndarray]
    draws: Draws
    pixels: Future[Tensor] = field(default_factory=Future)


class DaliDecoder:
    """DALI decoder of encoded images to uint8 (n, img_size, img_size, 3) on a GPU.

    The same work as `HostDecoder` on the CPU, by DALI's own operators; `dali_ops` says
    where their pixels differ. While one batch is waited for, the next is fed already.

    Pixels are made on the stream that is current where they are asked for, and the host
    waits until DALI has queued the work, not until the device has done it.

    Args:
        device: A CUDA device. On the CPU, where tests run it, it is slower than
            HostDecoder.
    """

    num_ahead = 1

    def __init__(
        self, settings: PixelSettings, *, batch_size: int, device: torch.device
    ) -> None:
        self._settings = settings
        self._batch_size = batch_size
        self._device = device
        self._threads = Threads(settings.data.num_decode_threads)
        self._in_flight: deque[_Batch] = deque()
        self._pipeline: Pipeline | None = self._build()

    def __call__(self, encoded: Sequence[np.ndarray], draws: Draws) -> Tensor:
        """Decode a batch; raises RuntimeError where one image of it is bad."""
        return self.start(encoded, draws)()

    def start(
        self, encoded: Sequence[np.ndarray], draws: Draws
    ) -> Callable[[], Tensor]:
        """Start decoding a batch; return a function that waits for its pixels."""
        exif = self._settings.data.exif
        try:
            views = plain_views(encoded, exif=exif, threads=self._threads)
            batch = _Batch(encoded=views, draws=draws)
        except BadImageError as error:  # nothing was fed: what is on its way goes on
            batch = _Batch(encoded=encoded, draws=draws)
            batch.pixels.set_exception(error)
        else:
            self._feed(batch)
        return lambda: self._pixels_of(batch)

    def reset(self) -> None:
        """Discard the pipeline; it is built anew before the next batch.

        Batches in flight are fed again when they are asked for.
        """
        self._in_flight.clear()
        self._pipeline = None

    def _feed(self, batch: _Batch) -> None:
        try:
            if self._pipeline is None:
                self._pipeline = self._build()
            _feed(self._pipeline, batch.encoded, batch.draws.geometry)
            for name, value in self._numbers(batch.draws).items():
                # A whole array, which is a batch too: a list costs twenty times as
                # long.
                self._pipeline.feed_input(name, np.ascontiguousarray(value))
            self._pipeline.schedule_run()
            self._in_flight.append(batch)
        except Exception as error:
            self._fail(batch, error)

    def _pixels_of(self, batch: _Batch) -> Tensor:
        while not batch.pixels.done():
            if batch not in self._in_flight:  # lost with another one that failed
                self._feed(batch)
            else:
                first = self._in_flight.popleft()
                try:
                    first.pixels.set_result(self._outputs())
                except Exception as error:
                    self._fail(first, error)
        return batch.pixels.result()

    def _fail(self, batch: _Batch, error: Exception) -> None:
        """Store an error for the batch's consumer; DALI may not go on after one."""
        batch.pixels.set_exception(error)
        self.reset()

    def _outputs(self) -> Tensor:
        assert self._pipeline is not None
        (output,) = self._pipeline.outputs(current_stream(self._device))
        # DALI's pool does not know which streams still read a tensor; torch's does.
        return torch.from_dlpack(output.as_tensor()).clone()

    def _numbers(self, draws: Draws) -> dict[str, np.ndarray]:
        geometry = draws.geometry
        numbers = {
            "resized": geometry.resized.astype(np.float32),
            "interpolation": _interpolations(geometry.bicubic),
            "crop": geometry.crop.astype(np.int32),
            "flip": geometry.flip.astype(np.int32),
        }
        if draws.ops is not None:
            numbers |= op_inputs(draws.ops, img_size=self._settings.img_size)
        return numbers

    def _build(self) -> Pipeline:
        pipeline = define_pixels(
            self._settings, batch_size=self._batch_size, device=self._device
        )
        pipeline.build()
        return pipeline


def define_pixels(
    settings: PixelSettings, *, batch_size: int, device: torch.device
) -> Pipeline:
    """Define the pipeline of a device, unbuilt: a GPU's needs none for that."""
    on_gpu = is_gpu(device)
    make: Any = pipeline_def
    define = make(
        batch_size=batch_size,
        num_threads=settings.data.num_decode_threads,
        device_id=(device.index or 0) if on_gpu else None,
        # Of the outputs. A batch that is fed while one is on its way is decoded after
        # it; with 2 the first `schedule_run` would want two batches.
        prefetch_queue_depth=1,
        exec_dynamic=True,
        # Each image goes through its own operations only.
        enable_conditionals=True,
    )
    return define(_pixels)(settings, on_gpu=on_gpu)


def _pixels(settings: PixelSettings, *, on_gpu: bool) -> Any:
    """Define the graph: decode, resize, crop, flip, augment."""
    load = settings.data.hw_decoder_load
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
        # What is to be turned comes turned, see plain_views.
        adjust_orientation=False,
        **(only_gpu if device == "mixed" else {}),
    )


def _interpolations(bicubic: np.ndarray) -> np.ndarray:
    kinds: Any = types.DALIInterpType
    cubic, linear = int(kinds.INTERP_CUBIC), int(kinds.INTERP_LINEAR)
    return np.where(bicubic, cubic, linear).astype(np.int32)
