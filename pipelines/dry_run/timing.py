"""Time a few real steps of a run's model on this machine, on random images."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from pipelines.config import Probe, Run
from pipelines.data.batch import Batch
from pipelines.hardware.device import autocast_dtype, numerics_kept, synchronize
from pipelines.training.metrics import MetricSums
from pipelines.training.model import without_weights
from pipelines.training.state import build_state
from pipelines.training.step import TrainSettings, train_step

_NUM_WARM_STEPS = 1
_MIN_STEPS, _MAX_STEPS = 2, 10
# BatchNorm trains on no fewer images.
_MIN_BATCH_SIZE = 2
_STEP_S = 1.5
"""How long a timed step may take, as the rate of matrix products lets expect it."""
_LONGEST_STEP_S = 4.0
EXPECTED_SHARE = 0.25
"""Of the matrix rate, that a step is assumed to reach until one was timed."""
_MATRIX_SIDES = {"cpu": 1024, "cuda": 8192}
_MATRIX_S = 0.3


@dataclass(frozen=True, kw_only=True)
class Timed:
    """Timings of this machine; rates are of one worker, in FLOP/s."""

    device: str
    num_threads: int
    matrix_rate: float
    """Of large matrix products in the type that a step computes in."""
    batch_size: int = 0
    """Images of a timed step; 0 if a step would have taken too long, or too much
    memory."""
    images_per_s: float = 0.0


def time_here(
    run: Run,
    *,
    num_classes: int,
    training_macs: int,
    device: torch.device,
    room_images: int,
) -> Timed:
    """Time matrix products and steps of at most a micro-batch, for a few seconds.

    A step is that of training: forward, backward, optimiser and average, eager, without
    reading images and without other workers.

    Args:
        training_macs: Of one image; they bound how long a step may take.
        room_images: Images of a step that fit into memory.
    """
    num_threads = max(int(run.scale.cpus_per_worker), 1)
    with _alone(num_threads):
        dtype = autocast_dtype(device, amp=run.scale.amp)
        rate = matrix_rate(device, dtype=dtype)
        per_image_s = 2 * training_macs / (rate * EXPECTED_SHARE)
        affordable = min(int(_STEP_S / per_image_s), room_images)
        size = min(max(affordable, _MIN_BATCH_SIZE), run.micro_batch_size)
        timed = Timed(device=str(device), num_threads=num_threads, matrix_rate=rate)
        if size * per_image_s > _LONGEST_STEP_S or size > room_images:
            return timed
        num_steps = min(
            max(int(_STEP_S / (size * per_image_s)), _MIN_STEPS), _MAX_STEPS
        )
        batch = _random_batch(run, device=device, num_images=size)
        seconds = _time_steps(run, num_classes=num_classes, batch=batch, num=num_steps)
    return dataclasses.replace(timed, batch_size=size, images_per_s=size / seconds)


def matrix_rate(device: torch.device, *, dtype: torch.dtype) -> float:
    """Measure the FLOP/s of large square matrix products."""
    side = _MATRIX_SIDES[device.type]
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = a @ b
    num_products, start_s, seconds = 0, _now_s(device), 0.0
    while seconds < _MATRIX_S:
        torch.mm(a, b, out=out)
        num_products += 1
        seconds = _now_s(device) - start_s
    return num_products * 2 * side**3 / seconds


def _time_steps(run: Run, *, num_classes: int, batch: Batch, num: int) -> float:
    """Measure the seconds of a step on a batch: the mean of `num`, after a warm-up."""
    run = dataclasses.replace(
        run,
        model=without_weights(run.model),
        # Compiling would take minutes, and no worker stands beside this one.
        scale=dataclasses.replace(
            run.scale, compile=False, num_workers=1, min_workers=0, sharding="none"
        ),
        probe=Probe(),
        audit_log="",
    )
    device = batch.images.device
    state = build_state(run, num_classes=num_classes, device=device)
    settings = TrainSettings(
        run=run,
        num_classes=num_classes,
        steps_per_epoch=1000,
        images_per_epoch=1000 * len(batch.labels),
        device=device,
    )
    sums, start_s = MetricSums(device), 0.0
    state.train_mode()
    for index in range(_NUM_WARM_STEPS + num):
        if index == _NUM_WARM_STEPS:
            start_s = _now_s(device)
        batch = dataclasses.replace(batch, index=index)
        train_step(state, [batch], settings=settings, sums=sums)
        # As the loop does on a CPU after every step.
        state.guard.check()
    return (_now_s(device) - start_s) / num


def _random_batch(run: Run, *, device: torch.device, num_images: int) -> Batch:
    size = run.model.img_size
    images = torch.randn(num_images, 3, size, size, device=device)
    return Batch(
        images=images.to(memory_format=torch.channels_last),
        labels=torch.zeros(num_images, dtype=torch.int64, device=device),
        weights=torch.ones(num_images, device=device),
        draw_ids=np.arange(num_images),
        epoch=0,
        index=0,
        micro=0,
        global_rows=num_images,
        ends_step=True,
        ends_epoch=False,
    )


def _now_s(device: torch.device) -> float:
    """Return the time after synchronising with a device."""
    synchronize(device)
    return time.perf_counter()


@contextlib.contextmanager
def _alone(num_threads: int) -> Iterator[None]:
    """Set a worker's number of threads, and restore PyTorch's state afterwards."""
    before = torch.get_num_threads()
    state = torch.get_rng_state()
    torch.set_num_threads(num_threads)
    try:
        with numerics_kept():
            yield
    finally:
        torch.set_num_threads(before)
        torch.set_rng_state(state)
