"""Build DALI graphs of the decoder alone: nothing but `decoders.image`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import nvidia.dali.fn as fn
import nvidia.dali.types as types
import torch
from nvidia.dali.pipeline import Pipeline

from benchmarks.on_gpu.stages import Setting
from pipelines.hardware.device import current_stream, is_gpu


class BareDecoder:
    """Decoder of whole images by DALI's device, without any other operation.

    Args:
        hardware: Share of a batch for the JPEG engine, 0 to 1.
        fancy: Whether chroma is interpolated, as in libjpeg.
    """

    def __init__(
        self,
        setting: Setting,
        *,
        device: torch.device,
        batch_size: int,
        hardware: float,
        fancy: bool,
    ) -> None:
        self._device = device
        self._pipeline: Any = Pipeline(
            batch_size=batch_size,
            num_threads=setting.num_threads,
            device_id=(device.index or 0) if is_gpu(device) else None,
            prefetch_queue_depth=1,
            exec_dynamic=True,
        )
        with self._pipeline:
            encoded = fn.external_source(
                name="encoded", dtype=types.DALIDataType.UINT8, ndim=1, no_copy=True
            )
            images = fn.decoders.image(
                encoded,
                device="mixed" if is_gpu(device) else "cpu",
                output_type=types.DALIImageType.RGB,
                adjust_orientation=False,
                hw_decoder_load=hardware,
                jpeg_fancy_upsampling=fancy,
            )
            self._pipeline.set_outputs(images)
        self._pipeline.build()

    def start(self, encoded: Sequence[np.ndarray]) -> None:
        """Queue a batch for decoding."""
        self._pipeline.feed_input("encoded", list(encoded))
        self._pipeline.schedule_run()

    def finish(self) -> Any:
        """Return the oldest batch on the current stream: a TensorList on the device.

        Raises RuntimeError if an image is bad.
        """
        (output,) = self._pipeline.outputs(current_stream(self._device))
        return output

    def arrays(self, encoded: Sequence[bytes]) -> list[np.ndarray]:
        """Decode a batch and wait: uint8 (height, width, 3) each, on the host."""
        self.start([np.frombuffer(image, np.uint8) for image in encoded])
        output = self.finish()
        found = [torch.from_dlpack(output[at]) for at in range(len(encoded))]
        return [image.cpu().numpy() for image in found]
