"""Measure decoded images per second: ours beside the decoder's own limit."""

from __future__ import annotations

import functools
import itertools
from collections import deque
from collections.abc import Callable, Iterator

import numpy as np

from benchmarks.on_gpu.end_to_end import case_of, on_shards
from benchmarks.on_gpu.images import batches_of, encoded_images, rows_of
from benchmarks.on_gpu.pixels import POLICY, BareDecoder, settings_of
from benchmarks.on_gpu.setting import Figures, Setting, Tasks, times_ms
from pipelines.data.batch import Batch
from pipelines.data.loader import opened_here
from pipelines.data.shard_set import read_shard_set
from pipelines.transforms.dali import DaliDecoder
from pipelines.transforms.sampling import draw

# Batches whose draws are made before the clock starts.
_NUM_BATCHES = 4
# More than can be taken.
_NUM_EPOCHS = 10_000


def tasks(setting: Setting) -> Tasks:
    """Time by batch size: the bare decoder, ours, and a training's batches."""
    sizes = setting.pick((128, 64, 256), tiny=(4,))
    found: dict[str, Callable[[], Figures]] = {}
    for size in sizes:
        makers = {
            "decoders.image alone": functools.partial(_bare, hardware=0.65),
            "ours": functools.partial(_ours, policy=""),
            "ours, RandAugment": functools.partial(_ours, policy=POLICY),
        }
        if size == sizes[0]:
            makers |= {
                "decoders.image alone, no engine": functools.partial(
                    _bare, hardware=0.0
                ),
                "decoders.image alone, engine only": functools.partial(
                    _bare, hardware=1.0
                ),
                "batches of a training": _supply,
            }
        for name, make in makers.items():
            measure = functools.partial(_measure, setting, make, size)
            found[f"{name}, batch {size}"] = measure
    return found


def _measure(
    setting: Setting, make: Callable[..., Callable[[], object]], batch_size: int
) -> Figures:
    found = times_ms(make(setting, batch_size=batch_size), setting=setting)
    rates = (1000 * batch_size / ms for ms in (found.median, found.high, found.low))
    names = ("images_per_s", "lowest", "highest")
    return {**dict(zip(names, rates, strict=True)), "batch_ms": found.median}


def _bare(
    setting: Setting, *, batch_size: int, hardware: float
) -> Callable[[], object]:
    decode = BareDecoder(setting, batch_size=batch_size, hardware=hardware)
    batches = batches_of(encoded_images(setting), batch_size=batch_size)
    views = ([np.frombuffer(image, np.uint8) for image in of] for of in batches)
    decode.start(next(views))

    def decode_next() -> object:
        decode.start(next(views))
        return decode.finish()

    return decode_next


def _ours(setting: Setting, *, batch_size: int, policy: str) -> Callable[[], object]:
    """Build a GPU's decoder with crop, resize, flip and operations, a batch ahead."""
    settings = settings_of(setting, train=True, policy=policy)
    decode = DaliDecoder(settings, batch_size=batch_size, device=setting.device)
    batches = batches_of(encoded_images(setting), batch_size=batch_size)
    rows = [rows_of(next(batches)) for _ in range(_NUM_BATCHES)]
    drawn = itertools.cycle(
        (of.views, draw(of, settings=settings, epoch=epoch))
        for epoch, of in enumerate(rows)
    )
    begun = deque([decode.start(*next(drawn)) for _ in range(decode.num_ahead)])

    def decode_next() -> object:
        begun.append(decode.start(*next(drawn)))
        return begun.popleft()()

    return decode_next


def _supply(setting: Setting, *, batch_size: int) -> Callable[[], object]:
    """Supply a training's batches from shards, without any work on them."""

    def batches() -> Iterator[Batch]:
        case = case_of(setting, "channels_last", batch_size=batch_size)
        run = on_shards(setting, case, num_epochs=_NUM_EPOCHS)
        shards = read_shard_set(run.data.train)
        with opened_here(shards, run=run, device=setting.device, train=True) as loader:
            yield from loader

    return functools.partial(next, batches())
