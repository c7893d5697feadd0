"""Measure the device's pixel differences from the CPU, by JPEG decoder settings."""

from __future__ import annotations

import dataclasses
import functools
import io
import itertools
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from benchmarks.on_gpu.dali_graphs import BareDecoder
from benchmarks.on_gpu.images import encoded_images, rows_of
from benchmarks.on_gpu.rates import device_of
from benchmarks.on_gpu.stages import Figures, Setting, Tasks
from pipelines.config import Augment, Data
from pipelines.hardware.device import CPU
from pipelines.transforms.dali import DaliDecoder
from pipelines.transforms.decoder import make_decoder
from pipelines.transforms.sampling import PixelSettings, draw

POLICY = "rand-m9-mstd0.5-inc1"
# Of DALI's default share of the hardware's, none and all.
_HARDWARE = (0.65, 0.0, 1.0)


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


def _decoded(setting: Setting, *, hardware: float, fancy: bool) -> Figures:
    """Compare with Pillow, which DALI's CPU decoder agrees with bit for bit."""
    images = encoded_images(setting)[: setting.pick(64, tiny=8)]
    decode = BareDecoder(
        setting,
        device=device_of(setting),
        batch_size=len(images),
        hardware=hardware,
        fancy=fancy,
    )
    found = decode.arrays(images)
    wanted = [np.asarray(Image.open(io.BytesIO(it)).convert("RGB")) for it in images]
    # In another order, and so in another part of the batch.
    again = decode.arrays(images[::-1])[::-1]
    moved = sum(
        not np.array_equal(one, other) for one, other in zip(found, again, strict=True)
    )
    return {**distance(found, wanted), "images_that_order_changes": moved}


def distance(found: Sequence[np.ndarray], wanted: Sequence[np.ndarray]) -> Figures:
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


def _seen(setting: Setting, *, hardware: float, train: bool, policy: str) -> Figures:
    """Compare a GPU's decoding graph with the CPU's decoder, on the same draws."""
    rows = rows_of(encoded_images(setting)[: setting.pick(64, tiny=8)])
    settings = settings_of(setting, train=train, policy=policy, hardware=hardware)
    draws = draw(rows, settings=settings, epoch=0)
    device, size = device_of(setting), len(rows)
    found = DaliDecoder(settings, batch_size=size, device=device)(rows.views, draws)
    judge = make_decoder(settings, batch_size=size, device=CPU)
    wanted = judge.start(rows.views, draws)()
    return {**distance(_arrays(found), _arrays(wanted)), "num_images": len(rows)}


def _arrays(pixels: torch.Tensor) -> list[np.ndarray]:
    return list(pixels.cpu().numpy())
