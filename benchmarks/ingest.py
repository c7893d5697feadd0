"""Time loaders of images side by side, ours and what a user would pick instead.

    python -m benchmarks.ingest
    python -m benchmarks.ingest --short-side 256 --json result.json --plot result.png
    python -m benchmarks.ingest --rounds 0 --synthetic-step

All read the same photographs, as many as `--num-images`, about 105 kB each, from the
page cache, with the same number of threads or processes, and do the same work: decode,
random resized crop to 224, flip, normalise, float32 batches of 64. Nobody works on the
batches. For all loaders, install the extra `bench` into an environment of its own.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import report
from benchmarks.checks import reference_moments
from benchmarks.frame import Durations, Entry, run_alone, run_rounds
from benchmarks.ours import ours
from benchmarks.result_file import write_result
from benchmarks.rivals import (
    dali_files,
    mosaic_streaming,
    ray_data,
    torchvision_files,
    webdataset_tars,
)
from benchmarks.sets import Sets, make_sets
from benchmarks.transforms import Pixels, Policy
from benchmarks.waiting import train_and_wait
from benchmarks.work import Loader, Work
from pipelines.cli import parse, run_command
from pipelines.outputs import check_file, check_plot

_PROG = "benchmarks.ingest"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Say what is timed, and how long."""

    num_images: int = 1024
    """Photographs of the set, a multiple of 64."""
    num_threads: int = 2
    """Threads, or worker processes, of every loader."""
    rounds: int = 5
    """0 leaves out the comparison."""
    round_s: float = 8.0
    warm_s: float = 3.0
    """Seconds at the start of a round that are not counted."""
    rand_augment: bool = False
    """With RandAugment: timm's where Pillow decodes, else the library's own."""
    short_side: int | None = None
    """Ours reads shards of this short side; the others read both."""
    loaders: tuple[str, ...] = ()
    """Names of those to time; all where none is given."""
    synthetic_step: bool = False
    """Also train on what ours gives, and see how long that waits."""
    folder: Path | None = None
    """Keeps the images; a temporary folder where it is not given."""
    json: Path | None = None
    """File for all figures."""
    plot: Path | None = None
    """File for a picture, PNG."""

    def __post_init__(self) -> None:
        if self.num_images < 1 or self.num_images % 64:
            raise ValueError(
                f"wanted a multiple of 64 images, came {self.num_images}; "
                "set --num-images"
            )
        if self.num_threads < 1:
            raise ValueError(
                f"wanted a thread at least, came {self.num_threads}; set --num-threads"
            )


def line_up(*, rand_augment: bool) -> list[Loader]:
    """List the loaders that there are, installed or not."""
    paths: list[tuple[Pixels, Policy]] = [("tensor", "torchvision"), ("pil", "timm")]
    loaders = [
        Loader(name=report.OURS, batches=ours, libraries=("ray.data",), on_ray=True),
        Loader(name="dali-files", batches=dali_files, libraries=("nvidia.dali.fn",)),
        Loader(
            name="ray-data-tensor",
            batches=functools.partial(ray_data, policy="torchvision"),
            libraries=("ray.data",),
            on_ray=True,
        ),
    ]
    for name, function, libraries in (
        ("torchvision", torchvision_files, ()),
        ("streaming", mosaic_streaming, ("streaming",)),
        ("webdataset", webdataset_tars, ("webdataset",)),
    ):
        for pixels, policy in paths:
            batches: Any = functools.partial(function, pixels=pixels, policy=policy)
            loaders.append(
                Loader(name=f"{name}-{pixels}", batches=batches, libraries=libraries)
            )
    if rand_augment:
        own = functools.partial(torchvision_files, pixels="pil", policy="torchvision")
        loaders.append(Loader(name="torchvision-pil-own", batches=own))
    return loaders


def _installed(loader: Loader) -> bool:
    return all(
        importlib.util.find_spec(name.partition(".")[0]) for name in loader.libraries
    )


def choose(loaders: Sequence[Loader], *, names: Sequence[str]) -> list[Loader]:
    """Take the loaders of these names, or all that are installed.

    Raises ValueError where a name is not known or its library is missing.
    """
    known = {loader.name: loader for loader in loaders}
    for name in names:
        if name not in known:
            raise ValueError(
                f"wanted loaders out of {', '.join(known)}, came {name!r}; "
                "set --loaders"
            )
        if not _installed(known[name]):
            raise ValueError(
                f"wanted {name}, came a machine without its library; install the "
                "extra 'bench'"
            )
    if names:
        return [known[name] for name in names]
    for loader in loaders:
        if not _installed(loader):
            print(f"left out, not installed: {loader.name}", file=sys.stderr)
    return [loader for loader in loaders if _installed(loader)]


def entries_of(
    loaders: Sequence[Loader], *, sets: Sets, options: Options
) -> list[Entry]:
    """Pair the loaders with the sets that they read."""
    work = work_on(sets.original, options=options)
    small = None if sets.small is None else work_on(sets.small, options=options)
    works = [(work, "")]
    if small is not None:
        works.append((small, f"@{options.short_side}"))
    references = {item.folder: reference_moments(item) for item, _ in works}
    entries = []
    for loader in loaders:
        # Ours reads the set that is made for it.
        of_loader = [(works[-1][0], "")] if loader.name == report.OURS else works
        entries += [
            Entry(
                name=f"{loader.name}{suffix}",
                loader=loader,
                work=item,
                reference=references[item.folder],
            )
            for item, suffix in of_loader
        ]
    return entries


def work_on(folder: Path, *, options: Options) -> Work:
    """Describe the work on a set's folder."""
    return Work(
        folder=folder,
        num_images=options.num_images,
        num_threads=options.num_threads,
        rand_augment=options.rand_augment,
        device="cuda" if torch.cuda.is_available() else "cpu",
    )


@contextlib.contextmanager
def _place(folder: Path | None) -> Iterator[Path]:
    if folder is not None:
        yield folder.absolute()
        return
    with tempfile.TemporaryDirectory() as temporary:
        yield Path(temporary)


def _main(arguments: Sequence[str]) -> None:
    options = parse(Options, arguments=arguments, prog=_PROG, text=__doc__)
    check_file(options.json, option="json")
    check_plot(options.plot)
    loaders = choose(line_up(rand_augment=options.rand_augment), names=options.loaders)
    result: dict[str, Any] = {"machine": report.machine(), "options": str(options)}
    step = ["waiting"] if options.synthetic_step else []
    with _place(options.folder) as folder:
        sets = make_sets(
            folder, num_images=options.num_images, short_side=options.short_side
        )
        for name, path in (("original", sets.original), ("small", sets.small)):
            if path is not None:
                images = report.images_of(work_on(path, options=options))
                result[f"{name}_images"] = images
        if options.rounds:
            entries = entries_of(loaders, sets=sets, options=options)
            names = [entry.name for entry in entries]

            def save(rounds: report.Rounds) -> None:
                result["loaders"] = report.as_json(rounds)
                missing = [name for name in names if name not in rounds] + step
                write_result(options.json, result, missing=missing)

            _compare(entries, options=options, save=save)
        if options.synthetic_step:
            work = work_on(sets.small or sets.original, options=options)
            waiting = run_alone(functools.partial(train_and_wait, work))
            print(report.waiting_text(waiting))
            result["waiting"] = asdict(waiting)
    write_result(options.json, result, missing=[])


def _compare(
    entries: Sequence[Entry],
    *,
    options: Options,
    save: Callable[[report.Rounds], None],
) -> None:
    rounds = run_rounds(
        entries,
        num_rounds=options.rounds,
        durations=Durations(warm_s=options.warm_s, measure_s=options.round_s),
        on_round=save,
    )
    machine = report.machine()
    title = f"{options.num_threads} threads, {machine['gpu'] or machine['cpu']}"
    print(f"{title}, {options.num_images} photographs")
    print(report.table(rounds))
    if options.plot:
        report.plot(rounds, title=title, path=options.plot)


if __name__ == "__main__":
    run_command(_main, prog=_PROG)
