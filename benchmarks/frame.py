"""Run loaders in turn, each round in a fresh process, and collect the rounds."""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import multiprocessing
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from benchmarks.sets import labelled_images
from benchmarks.timing import Clock, Round, time_batches
from benchmarks.work import Loaded, Loader, Transform, Work

_NUM_IMAGES = 256
# Crops are random and policies of RandAugment differ; pixels that are not normalised,
# or are by other numbers, are further off than this.
_TOLERANCE = 0.4
T = TypeVar("T")
_NUM_LOOKED_AT = 4
# Readers need CPUs beside the decoders'; they mostly wait, so these do not exist.
_NUM_READER_CPUS = 2
_THREAD_TIMEOUT_S = 2.0


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Mean and standard deviation of normalised pixels."""

    mean: float
    std: float


def reference_moments(work: Work) -> Moments:
    """Compute reference moments of some images, decoded with torchvision."""
    samples = list(labelled_images(work.folder / "images"))[:_NUM_IMAGES]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transform = Transform(work, pixels="tensor", policy="torchvision")
        images = transform.stack([path.read_bytes() for path, _ in samples])
    return moments(images)


def moments(images: Tensor) -> Moments:
    """Compute the moments over all pixels and channels."""
    return Moments(mean=images.mean().item(), std=images.std().item())


def check_batches(batches: Sequence[Loaded], *, work: Work, reference: Moments) -> None:
    """Raise ValueError if batches are not what the work asks for.

    Args:
        batches: At least two in a row.
    """
    shape = (work.batch_size, 3, work.img_size, work.img_size)
    expected = (torch.float32, shape, work.device, torch.int64, shape[:1])
    for images, labels in batches:
        of_images = (images.dtype, tuple(images.shape), images.device.type)
        got = (*of_images, labels.dtype, tuple(labels.shape))
        if got != expected:
            raise ValueError(f"expected images and labels {expected}, got {got}")
    found = moments(torch.cat([images for images, _ in batches]))
    off = max(abs(found.mean - reference.mean), abs(found.std - reference.std))
    if not off <= _TOLERANCE:
        raise ValueError(f"expected pixels like {reference}, got {found}")
    means = torch.cat([images.mean(dim=(2, 3)) for images, _ in batches])
    if len(means.unique(dim=0)) < len(means):
        raise ValueError("expected images that all differ, got some twice")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A loader with the images that it reads."""

    name: str
    loader: Loader
    work: Work
    reference: Moments


def run_rounds(
    entries: Sequence[Entry],
    *,
    num_rounds: int,
    warm_s: float,
    measure_s: float,
    on_round: Callable[[Mapping[str, Sequence[Round]]], None],
) -> dict[str, list[Round]]:
    """Time all loaders in interleaved rounds.

    The rounds are interleaved, so that a machine's drift hits all alike. Every round
    has a process of its own: threads, readers that load ahead and memory are gone
    before the next loader starts.

    Args:
        on_round: Callback with all rounds so far, after each.

    Raises ValueError, naming the loader, where one does not do the work.
    """
    rounds: dict[str, list[Round]] = {}
    for number in range(num_rounds):
        for entry in entries:
            timed = functools.partial(
                time_entry, entry, warm_s=warm_s, measure_s=measure_s
            )
            found = run_alone(timed)
            rounds.setdefault(entry.name, []).append(found)
            print(
                f"round {number + 1} of {num_rounds}  {entry.name:<24}"
                f"{found.images_per_s:8.0f} images/s  "
                f"others on {found.other_cores:.2f} cores",
                file=sys.stderr,
            )
            on_round(rounds)
    return rounds


def run_alone(function: Callable[[], T]) -> T:
    """Call a function in a fresh process, which then ends."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=spawn) as pool:
        return pool.submit(function).result()


def time_entry(entry: Entry, *, warm_s: float, measure_s: float) -> Round:
    """Time one round of one loader in this process."""
    loader, work = entry.loader, entry.work
    for name in loader.libraries:
        importlib.import_module(name)
    torch.set_num_threads(work.num_threads)
    on_gpu = work.device == "cuda"
    with contextlib.ExitStack() as stack:
        if loader.on_ray:
            stack.enter_context(ray_session(work.num_threads))
        batches = stack.enter_context(contextlib.closing(loader.batches(work)))
        try:
            return time_batches(
                batches,
                look=functools.partial(
                    check_batches, work=work, reference=entry.reference
                ),
                num_looked_at=_NUM_LOOKED_AT,
                warm_s=warm_s,
                measure_s=measure_s,
                clock=Clock(wait_for_device=torch.cuda.synchronize)
                if on_gpu
                else Clock(),
            )
        except ValueError as error:
            raise ValueError(f"{entry.name}: {error}") from error


@contextlib.contextmanager
def ray_session(num_threads: int) -> Iterator[None]:
    """Run a local Ray for the block's duration, or use the existing one."""
    import ray

    if ray.is_initialized():
        yield
        return
    ray.init(
        address="local",
        num_cpus=num_threads + _NUM_READER_CPUS,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.WARNING,
    )
    threads = set(threading.enumerate())
    try:
        yield
    finally:
        # Ray ends the process where a thread still asks for a block after this.
        for thread in set(threading.enumerate()) - threads:
            thread.join(timeout=_THREAD_TIMEOUT_S)
        ray.shutdown()
