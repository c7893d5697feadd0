"""Measure the device's pixel differences from the CPU, by JPEG decoder settings."""

from __future__ import annotations

import dataclasses
import functools
import io
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import nvidia.dali.fn as fn
import nvidia.dali.types as types
import torch
from nvidia.dali.pipeline import Pipeline
from PIL import Image

from benchmarks.on_gpu.setting import (
    Setting,
    Tasks,
    encoded_images,
    rows_of,
)
from benchmarks.rounds import Record
from pipelines.config import Augment, Data, PixelSettings
from pipelines.hardware.device import CPU, current_stream, is_gpu
from pipelines.transforms.dali import DaliDecoder
from pipelines.transforms.decoder import make_decoder
from pipelines.transforms.sampling import draw

POLICY = "rand-m9-mstd0.5-inc1"
# Of DALI's default share of the hardware's, none and all.
_HARDWARE = (0.65, 0.0, 1.0)


class BareDecoder:
    """Decoder of whole images by DALI's `decoders.image`, without other operations.

    Args:
        hardware: Share of a batch for the JPEG engine, 0 to 1.
        fancy: Whether chroma is interpolated, as in libjpeg.
    """

    def __init__(
        self, setting: Setting, *, batch_size: int, hardware: float, fancy: bool = True
    ) -> None:
        self._device = setting.device
        on_gpu = is_gpu(self._device)
        self._pipeline: Any = Pipeline(
            batch_size=batch_size,
            num_threads=setting.num_threads,
            device_id=(self._device.index or 0) if on_gpu else None,
            prefetch_queue_depth=1,
            exec_dynamic=True,
        )
        with self._pipeline:
            encoded = fn.external_source(
                name="encoded", dtype=types.DALIDataType.UINT8, ndim=1, no_copy=True
            )
            images = fn.decoders.image(
                encoded,
                device="mixed" if on_gpu else "cpu",
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


def tasks(setting: Setting) -> Tasks:
    """Compare whole images by the decoder alone, then training's and evaluation's."""
    whole = {
        f"decoded, engine {hardware}, fancy upsampling {fancy}": functools.partial(
            _decoded, setting, hardware=hardware, fancy=fancy
        )
        for hardware, fancy in itertools.product(_HARDWARE, (True, False))
    }
    kinds = {
        "evaluation": functools.partial(_seen, setting, train=False, policy=""),
        "training": functools.partial(_seen, setting, train=True, policy=""),
        "RandAugment": functools.partial(_seen, setting, train=True, policy=POLICY),
    }
    seen = {
        f"{name}, engine {hardware}": functools.partial(measure, hardware=hardware)
        for name, measure in kinds.items()
        for hardware in _HARDWARE[:2]
    }
    return {**whole, **seen}


def _decoded(setting: Setting, *, hardware: float, fancy: bool) -> Record:
    """Compare with Pillow, which DALI's CPU decoder agrees with bit for bit."""
    images = encoded_images(setting)[: setting.pick(64, tiny=8)]
    decode = BareDecoder(
        setting, batch_size=len(images), hardware=hardware, fancy=fancy
    )
    found = decode.arrays(images)
    wanted = [np.asarray(Image.open(io.BytesIO(it)).convert("RGB")) for it in images]
    # In another order, and so in another part of the batch.
    again = decode.arrays(images[::-1])[::-1]
    moved = sum(
        not np.array_equal(one, other) for one, other in zip(found, again, strict=True)
    )
    return {**distance(found, wanted), "images_that_order_changes": moved}


def distance(found: Sequence[np.ndarray], wanted: Sequence[np.ndarray]) -> Record:
    """Measure the levels between two decodings of the same images, over all pixels."""
    pairs = zip(found, wanted, strict=True)
    apart = np.concatenate(
        [np.abs(a.astype(np.int16) - b.astype(np.int16)).ravel() for a, b in pairs]
    )
    return {
        "mean": float(apart.mean()),
        "most": int(apart.max()),
        "share_over_2": float((apart > 2).mean()),
        "share_over_16": float((apart > 16).mean()),
    }


def settings_of(
    setting: Setting, *, train: bool, policy: str = "", hardware: float | None = None
) -> PixelSettings:
    """Return the pixel settings of a run on ImageNet."""
    data = Data(train="", val="", batch_size=1, num_decode_threads=setting.num_threads)
    if hardware is not None:
        data = dataclasses.replace(data, hw_decoder_load=hardware)
    return PixelSettings(
        data=data,
        augment=Augment(auto_augment=policy),
        img_size=setting.pick(224, tiny=32),
        seed=0,
        train=train,
    )


def _seen(setting: Setting, *, hardware: float, train: bool, policy: str) -> Record:
    """Compare a GPU's decoding graph with the CPU's decoder, on the same draws."""
    rows = rows_of(encoded_images(setting)[: setting.pick(64, tiny=8)])
    settings = settings_of(setting, train=train, policy=policy, hardware=hardware)
    draws = draw(rows, settings=settings, epoch=0)
    size = len(rows)
    found = DaliDecoder(settings, batch_size=size, device=setting.device)(
        rows.views, draws
    )
    judge = make_decoder(settings, batch_size=size, device=CPU)
    wanted = judge.start(rows.views, draws)()
    return {**distance(_arrays(found), _arrays(wanted)), "num_images": len(rows)}


def _arrays(pixels: torch.Tensor) -> list[np.ndarray]:
    return list(pixels.cpu().numpy())
