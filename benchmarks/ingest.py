"""Time loaders of images side by side, ours and what a user would pick instead.

    python -m benchmarks.ingest
    python -m benchmarks.ingest --short-side 256 --json result.json

All read the same photographs, as many as `--num-images`, about 105 kB each, from the
page cache, with the same number of threads or processes, and do the same work: decode,
random resized crop to 224, flip, normalise, float32 batches of 64. Nobody works on the
batches. Each round has a process of its own. For all loaders, install the extra `bench`
into an environment of its own.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
import multiprocessing
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

import torch

from benchmarks.loaders import (
    dali_files,
    mosaic_streaming,
    ours,
    ray_data,
    torchvision_files,
    webdataset_tars,
)
from benchmarks.machine import cpu_seconds
from benchmarks.rounds import Frame, Record, ratios, run_rounds, shown_spread
from benchmarks.sets import make_set
from benchmarks.work import Batches, Loaded, Work
from pipelines.cli.command import parse, run_command
from pipelines.cli.outputs import check_file

T = TypeVar("T")
_PROG = "benchmarks.ingest"
_OURS = "ours"
ON_RAY = (_OURS, "ray-data")
_EXTRA = ("streaming", "webdataset")
_MIN_BATCHES = 2
# Readers need CPUs beside the decoders'; they mostly wait, so these do not exist.
_NUM_READER_CPUS = 2
_THREAD_TIMEOUT_S = 2.0


LOADERS: Mapping[str, Callable[[Work], Batches]] = MappingProxyType(
    {
        _OURS: ours,
        "dali-files": dali_files,
        "ray-data": ray_data,
        "torchvision-tensor": functools.partial(torchvision_files, pixels="tensor"),
        "torchvision-pil": functools.partial(torchvision_files, pixels="pil"),
        "streaming": mosaic_streaming,
        "webdataset": webdataset_tars,
    }
)
"""Each yields batches indefinitely; closing it ends all threads and processes."""


def is_installed(name: str) -> bool:
    """Check whether a loader's library is there: those of the extra may be missing."""
    return name not in _EXTRA or importlib.util.find_spec(name) is not None


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is timed, and how long."""

    num_images: int = 1024
    """Photographs of the set, a multiple of 64."""
    num_threads: int = 2
    """Threads, or worker processes, of every loader."""
    rounds: int = 5
    round_s: float = 8.0
    warm_s: float = 3.0
    """Seconds at the start of a round that are not counted."""
    rand_augment: bool = False
    """With RandAugment: timm's where Pillow decodes, else the library's own."""
    short_side: int | None = None
    """All read images of this short side instead of the originals."""
    loaders: tuple[str, ...] = ()
    """Names of those to time; all where none is given."""
    folder: Path | None = None
    """Keeps the images; a temporary folder where it is not given."""
    json: Path | None = None
    """File for all figures."""

    def __post_init__(self) -> None:
        at_least_one = (self.num_images, self.num_threads, self.rounds)
        if min(at_least_one) < 1 or self.num_images % 64:
            raise ValueError(
                "expected a multiple of 64 images, and a thread and a round at least, "
                f"got {at_least_one}; set --num-images, --num-threads or --rounds"
            )
        here = [name for name in LOADERS if is_installed(name)]
        if not set(self.loaders) <= set(here):
            raise ValueError(
                f"expected loaders of {here}, got {list(self.loaders)}; set --loaders, "
                "or install the extra 'bench'"
            )


def run_alone(function: Callable[[], T]) -> T:
    """Call a function in a fresh process, which then ends.

    Threads, readers that load ahead and memory are gone before the next one starts.
    """
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=spawn) as pool:
        return pool.submit(function).result()


def time_loader(name: str, *, work: Work, warm_s: float, measure_s: float) -> Record:
    """Time one round of a loader in this process."""
    torch.set_num_threads(work.num_threads)
    with contextlib.ExitStack() as stack:
        if name in ON_RAY:
            stack.enter_context(ray_session(work.num_threads))
        batches = delivered(LOADERS[name], work)
        stack.enter_context(contextlib.closing(batches))
        return time_batches(batches, warm_s=warm_s, measure_s=measure_s)


def delivered(load: Callable[[Work], Batches], work: Work) -> Batches:
    """Yield a loader's batches on the work's device, without waiting for the copies."""
    device = torch.device(work.device)
    with contextlib.closing(load(work)) as batches:
        for images, labels in batches:
            yield (
                images.to(device, non_blocking=True),
                labels.to(device, torch.int64, non_blocking=True),
            )


@contextlib.contextmanager
def ray_session(num_threads: int) -> Iterator[None]:
    """Run a local Ray for the block's duration."""
    import ray

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


def time_batches(
    batches: Iterator[Loaded], *, warm_s: float, measure_s: float
) -> Record:
    """Time a loader without any work on its batches.

    Args:
        warm_s: Batches that come within this time after the first are not counted.
        measure_s: The first batch after this time ends the round.
    """
    start_s = time.perf_counter()
    next(batches)
    first_batch_s = time.perf_counter() - start_s
    _take(batches, seconds=warm_s)
    start_cpu_s = cpu_seconds()
    num_images, seconds = _take(batches, seconds=measure_s)
    return {
        "images_per_s": num_images / seconds,
        "images_per_cpu_s": num_images / (cpu_seconds() - start_cpu_s),
        "first_batch_s": first_batch_s,
    }


def _take(batches: Iterator[Loaded], *, seconds: float) -> tuple[int, float]:
    """Take batches for some seconds; return their images and the time taken."""
    start_s = time.perf_counter()
    num_images = num_batches = 0
    while num_batches < _MIN_BATCHES or time.perf_counter() - start_s < seconds:
        num_images += len(next(batches)[1])
        num_batches += 1
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return num_images, time.perf_counter() - start_s


def table(records: Frame) -> str:
    """Format a line per loader, the fastest first."""
    by_case = records.groupby("case")
    shown = by_case[["images_per_cpu_s", "first_batch_s"]].median()
    shown.insert(0, "images/s", by_case["images_per_s"].apply(shown_spread, ".0f"))
    if _OURS in shown.index:
        times = ratios(records, "images_per_s", to=_OURS).rdiv(1.0)
        shown["ours is, times"] = times.apply(shown_spread, form=".2f")
    order = by_case["images_per_s"].median().sort_values(ascending=False).index
    return shown.loc[order].to_string(float_format="{:.1f}".format)


def _main(arguments: Sequence[str]) -> None:
    options = parse(Options, arguments=arguments, prog=_PROG, text=__doc__)
    check_file(options.json, option="json")
    for name in LOADERS:
        if not is_installed(name):
            print(f"left out, not installed: {name}", file=sys.stderr)
    names = options.loaders or tuple(filter(is_installed, LOADERS))
    with contextlib.ExitStack() as stack:
        folder = options.folder
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        num_images, short_side = options.num_images, options.short_side
        work = Work(
            folder=make_set(
                folder.absolute(), num_images=num_images, short_side=short_side
            ),
            num_images=num_images,
            num_threads=options.num_threads,
            rand_augment=options.rand_augment,
            device="cuda" if torch.cuda.is_available() else "cpu",
        )
        measure = functools.partial(
            time_loader,
            work=work,
            warm_s=options.warm_s,
            measure_s=options.round_s,
        )
        cases = {
            name: functools.partial(run_alone, functools.partial(measure, name))
            for name in names
        }
        run_rounds(
            cases,
            num_rounds=options.rounds,
            options=options,
            path=options.json,
            table=table,
        )


if __name__ == "__main__":
    run_command(_main, prog=_PROG)
