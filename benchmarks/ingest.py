"""Time loaders of images side by side, ours and what a user would pick instead.

    python -m benchmarks.ingest
    python -m benchmarks.ingest --short-side 256 --json result.json

All read the same photographs, as many as `--num-images`, about 105 kB each, from the
page cache, with the same number of threads or processes, and do the same work: decode,
random resized crop to 224, flip, normalise, float32 batches of 64. Nobody works on the
batches. For all loaders, install the extra `bench` into an environment of its own.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from benchmarks.frame import Entry, reference_moments, run_rounds
from benchmarks.loaders import (
    dali_files,
    mosaic_streaming,
    ours,
    ray_data,
    torchvision_files,
    webdataset_tars,
)
from benchmarks.machine import busy_text, machine
from benchmarks.result_file import write_result
from benchmarks.sets import Sets, labelled_images, make_sets
from benchmarks.timing import Round, Spread, ratios, spread
from benchmarks.work import Loader, Work
from pipelines.cli.command import parse, run_command
from pipelines.cli.outputs import check_file

OURS = "ours"
Rounds = Mapping[str, Sequence[Round]]
_PROG = "benchmarks.ingest"


def ours_to_others(rounds: Rounds) -> dict[str, Spread]:
    """Return our rate as a multiple of every other's; empty if ours did not run."""
    ours = [found.images_per_s for found in rounds.get(OURS, [])]
    return {
        name: ratios(ours, [found.images_per_s for found in of_loader])
        for name, of_loader in rounds.items()
        if ours and name != OURS
    }


def as_json(rounds: Rounds) -> dict[str, Any]:
    """Return all rounds, and the table's figures."""
    compared = ours_to_others(rounds)
    return {
        name: {
            **{
                figure: asdict(spread([getattr(found, figure) for found in of_loader]))
                for figure in ("images_per_s", "images_per_cpu_s", "first_batch_s")
            },
            "ours_to_this": asdict(compared[name]) if name in compared else None,
            "rounds": [asdict(found) for found in of_loader],
        }
        for name, of_loader in rounds.items()
    }


def table(rounds: Rounds) -> str:
    """Format a line per loader, the fastest first."""
    shown = {}
    for name, of in as_json(rounds).items():
        ours = of["ours_to_this"]
        shown[name] = {
            "images/s": Spread(**of["images_per_s"]).shown(".0f"),
            "images/CPU-s": f"{of['images_per_cpu_s']['median']:.0f}",
            "first batch": f"{of['first_batch_s']['median']:.1f} s",
            "ours is": f"{Spread(**ours).shown('.2f')} x" if ours else "",
        }
    order = sorted(
        rounds,
        key=lambda name: -spread([it.images_per_s for it in rounds[name]]).median,
    )
    lines = pd.DataFrame(shown).T.loc[order].to_string()
    others = [found.other_cores for of_loader in rounds.values() for found in of_loader]
    return f"{lines}\n{busy_text(others)}"


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
    """Ours reads shards of this short side; the others read both."""
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


def line_up(*, rand_augment: bool) -> list[Loader]:
    """List all loaders, installed or not."""
    tensor = functools.partial(ray_data, policy="torchvision")
    loaders = [
        Loader(name=OURS, batches=ours, libraries=("ray.data",), on_ray=True),
        Loader(name="dali-files", batches=dali_files, libraries=("nvidia.dali.fn",)),
        Loader(
            name="ray-data-tensor", batches=tensor, libraries=("ray.data",), on_ray=True
        ),
    ]
    rivals: list[tuple[str, Any, tuple[str, ...]]] = [
        ("torchvision", torchvision_files, ()),
        ("streaming", mosaic_streaming, ("streaming",)),
        ("webdataset", webdataset_tars, ("webdataset",)),
    ]
    for name, function, libraries in rivals:
        for pixels, policy in (("tensor", "torchvision"), ("pil", "timm")):
            batches = functools.partial(function, pixels=pixels, policy=policy)
            loaders.append(
                Loader(name=f"{name}-{pixels}", batches=batches, libraries=libraries)
            )
    if rand_augment:
        own = functools.partial(torchvision_files, pixels="pil", policy="torchvision")
        loaders.append(Loader(name="torchvision-pil-own", batches=own))
    return loaders


def choose(loaders: Sequence[Loader], *, names: Sequence[str]) -> list[Loader]:
    """Select loaders by name, or all that are installed.

    Raises ValueError if a name is unknown or its library is missing.
    """
    known = {loader.name: loader for loader in loaders}
    missing = [loader.name for loader in loaders if not _installed(loader)]
    for name in names:
        if name not in known or name in missing:
            raise ValueError(
                f"expected loaders out of {', '.join(known)}, those of other libraries "
                f"installed with the extra 'bench', got {name!r}; set --loaders"
            )
    if names:
        return [known[name] for name in names]
    if missing:
        print(f"left out, not installed: {', '.join(missing)}", file=sys.stderr)
    return [loader for loader in loaders if loader.name not in missing]


def _installed(loader: Loader) -> bool:
    return all(
        importlib.util.find_spec(name.partition(".")[0]) for name in loader.libraries
    )


def entries_of(
    loaders: Sequence[Loader], *, sets: Sets, options: Options
) -> list[Entry]:
    """Pair the loaders with their sets."""
    works = {"": work_on(sets.original, options=options)}
    if sets.small is not None:
        works[f"@{options.short_side}"] = work_on(sets.small, options=options)
    references = {suffix: reference_moments(work) for suffix, work in works.items()}
    entries = []
    for loader in loaders:
        # Ours reads the set that is made for it.
        is_ours = loader.name == OURS
        for suffix in list(works)[-1:] if is_ours else works:
            entries.append(
                Entry(
                    name=loader.name if is_ours else f"{loader.name}{suffix}",
                    loader=loader,
                    work=works[suffix],
                    reference=references[suffix],
                )
            )
    return entries


def work_on(folder: Path, *, options: Options) -> Work:
    """Build the work on a set's folder."""
    return Work(
        folder=folder,
        num_images=options.num_images,
        num_threads=options.num_threads,
        rand_augment=options.rand_augment,
        device="cuda" if torch.cuda.is_available() else "cpu",
    )


def _main(arguments: Sequence[str]) -> None:
    options = parse(Options, arguments=arguments, prog=_PROG, text=__doc__)
    check_file(options.json, option="json")
    loaders = choose(line_up(rand_augment=options.rand_augment), names=options.loaders)
    result: dict[str, Any] = {"machine": machine(), "options": str(options)}
    with contextlib.ExitStack() as stack:
        folder = options.folder
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        sets = make_sets(
            folder.absolute(),
            num_images=options.num_images,
            short_side=options.short_side,
        )
        for name, path in (("original", sets.original), ("small", sets.small)):
            if path is not None:
                sizes = [
                    it.stat().st_size for it, _ in labelled_images(path / "images")
                ]
                mean_bytes = statistics.mean(sizes)
                about = {"num_images": len(sizes), "mean_bytes": mean_bytes}
                result[f"{name}_images"] = about
        _compare(loaders, sets=sets, options=options, result=result)
    write_result(options.json, result, missing=[])


def _compare(
    loaders: Sequence[Loader], *, sets: Sets, options: Options, result: dict[str, Any]
) -> None:
    """Time the loaders; write the results after each round."""
    entries = entries_of(loaders, sets=sets, options=options)

    def save(rounds: Rounds) -> None:
        result["loaders"] = as_json(rounds)
        missing = [entry.name for entry in entries if entry.name not in rounds]
        write_result(options.json, result, missing=missing)

    rounds = run_rounds(
        entries,
        num_rounds=options.rounds,
        warm_s=options.warm_s,
        measure_s=options.round_s,
        on_round=save,
    )
    print(f"{options.num_threads} threads, {options.num_images} photographs")
    print(table(rounds))


if __name__ == "__main__":
    run_command(_main, prog=_PROG)
