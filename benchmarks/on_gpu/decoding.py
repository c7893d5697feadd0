"""Measure decoded images per second: ours beside the decoder's own limit."""

from __future__ import annotations

import functools
import itertools
import statistics
from collections import deque
from collections.abc import Callable, Iterator

import numpy as np

from benchmarks.on_gpu.pixels import POLICY, BareDecoder, settings_of
from benchmarks.on_gpu.setting import (
    Setting,
    Tasks,
    encoded_images,
    rows_of,
    times_ms,
)
from benchmarks.rounds import Record
from pipelines.transforms.dali import DaliDecoder
from pipelines.transforms.sampling import draw

# Batches whose draws are made before the clock starts.
_NUM_BATCHES = 4
Decode = Callable[[], object]
Make = Callable[[Setting, int], Decode]


def tasks(setting: Setting) -> Tasks:
    """Time by batch size: the bare decoder, with and without its engine, and ours."""
    sizes = setting.pick((128, 64, 256), tiny=(4,))
    makers: dict[str, Make] = {
        "decoders.image alone": functools.partial(_bare, hardware=0.65),
        "ours": functools.partial(_ours, policy=""),
        "ours, RandAugment": functools.partial(_ours, policy=POLICY),
        "decoders.image alone, no engine": functools.partial(_bare, hardware=0.0),
        "decoders.image alone, engine only": functools.partial(_bare, hardware=1.0),
    }
    return {
        f"{name}, batch {size}": functools.partial(_measure, setting, make, size)
        for size in sizes
        for name, make in makers.items()
        if size == sizes[0] or "engine" not in name
    }


def _measure(setting: Setting, make: Make, batch_size: int) -> Record:
    found = times_ms(make(setting, batch_size), setting=setting)
    rates = [1000 * batch_size / ms for ms in found]
    return {
        "images_per_s": statistics.median(rates),
        "lowest": min(rates),
        "highest": max(rates),
        "batch_ms": statistics.median(found),
    }


def _batches(setting: Setting, batch_size: int) -> Iterator[list[bytes]]:
    """Yield batches indefinitely, cycling through the images."""
    images = itertools.cycle(encoded_images(setting))
    while True:
        yield list(itertools.islice(images, batch_size))


def _bare(
    setting: Setting, batch_size: int, *, hardware: float
) -> Callable[[], object]:
    decode = BareDecoder(setting, batch_size=batch_size, hardware=hardware)
    batches = _batches(setting, batch_size)
    views = ([np.frombuffer(image, np.uint8) for image in of] for of in batches)
    decode.start(next(views))

    def decode_next() -> object:
        decode.start(next(views))
        return decode.finish()

    return decode_next


def _ours(setting: Setting, batch_size: int, *, policy: str) -> Decode:
    """Build a GPU's decoder with crop, resize, flip and operations, a batch ahead."""
    settings = settings_of(setting, train=True, policy=policy)
    decode = DaliDecoder(settings, batch_size=batch_size, device=setting.device)
    batches = itertools.islice(_batches(setting, batch_size), _NUM_BATCHES)
    drawn = itertools.cycle(
        [
            (of.views, draw(of, settings=settings, epoch=epoch))
            for epoch, of in enumerate(map(rows_of, batches))
        ]
    )
    begun = deque([decode.start(*next(drawn)) for _ in range(decode.num_ahead)])

    def decode_next() -> object:
        begun.append(decode.start(*next(drawn)))
        return begun.popleft()()

    return decode_next
