"""Measure what a large run's control plane costs, and say what runs out first.

    python -m benchmarks.scale
    python -m benchmarks.scale --costs result.json --images-per-gpu-s 2500

No GPU is needed. Reading from a bucket and keeping checkpoints are the code that
trains, timed on this machine; with RAY_ADDRESS, blocks too, on that Ray. docs/scale.md
has the tables, and what is assumed.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.machine import machine
from benchmarks.result_file import write_result
from benchmarks.scale import measure
from benchmarks.scale.model import Case, Cluster, Costs, Settings, loads_of
from pipelines.cli.command import parse, run_command
from pipelines.cli.outputs import check_file

_PROG = "benchmarks.scale"
_BLOCK_MS = 4.8  # of blocks of 68 kB, on two cores: docs/scale.md


@dataclass(frozen=True, kw_only=True)
class Options(Settings):
    """What is estimated, and from which constants."""

    num_gpus: tuple[int, ...] = (8, 64, 512)
    num_images: tuple[int, ...] = (1_281_167, 14_197_122, 10**9)
    """ImageNet-1K's, ImageNet-21K's, and as many as a crawl of the web gives."""
    images_per_gpu_s: tuple[float, ...] = (500.0, 1500.0, 3000.0)
    """What a GPU trains on: not measured here, so several."""
    block_ms: float | None = None
    """Ray's cost of a block, whatever was measured."""
    cluster: Cluster = field(default_factory=Cluster)
    costs: Path | None = None
    """A result file, whose costs are taken: nothing is measured."""
    folder: Path | None = None
    json: Path | None = None
    tiny: bool = False
    """Measure the least, to try the command itself."""

    def __post_init__(self) -> None:
        asked = (self.num_gpus, self.num_images, self.images_per_gpu_s)
        if not all(of and min(of) > 0 for of in asked):
            raise ValueError(
                f"expected GPUs, sets and rates, got {asked}; set --num-gpus, "
                "--num-images or --images-per-gpu-s"
            )


def trainings_of(options: Options, *, costs: Costs) -> list[dict[str, Any]]:
    """List each training's settings, and its load on each resource."""
    same = {of.name: getattr(options, of.name) for of in dataclasses.fields(Settings)}
    asked = (options.images_per_gpu_s, options.num_images, options.num_gpus)
    trainings = []
    for rate, num_images, num_gpus in itertools.product(*asked):
        case = Case(
            num_gpus=num_gpus, num_images=num_images, images_per_gpu_s=rate, **same
        )
        loads = loads_of(case, costs=costs, cluster=options.cluster)
        trainings.append({**asdict(case), "loads": loads})
    return trainings


def table(trainings: Sequence[dict[str, Any]]) -> str:
    """Format a line per training: its loads, and the largest."""
    asked = pd.DataFrame(trainings)[["images_per_gpu_s", "num_images", "num_gpus"]]
    loads = pd.DataFrame([training["loads"] for training in trainings])
    shown = pd.concat([asked, loads, loads.idxmax(axis=1).rename("first")], axis=1)
    return shown.to_string(index=False, float_format="{:.2g}".format)


def costs_of(found: Mapping[str, Any]) -> Costs:
    """Extract the model's constants from the measurements."""
    return Costs(**{of.name: found[of.name] for of in dataclasses.fields(Costs)})


def read_costs(path: Path) -> dict[str, Any]:
    """Read the costs of a result file; raise ValueError if there are none."""
    try:
        found = json.loads(path.read_text())["costs"]
        found |= found.get("kept", {})  # a checkpoint's, as of 2026-11
        costs_of(found)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"expected a result that python -m {_PROG} --json wrote, got {path} "
            f"({error!r}); leave out --costs to measure"
        ) from error
    return found


def measure_costs(options: Options) -> dict[str, Any]:
    """Measure all constants; blocks only with RAY_ADDRESS."""
    if options.folder is not None:
        options.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder, recipe = Path(name), "demo" if options.tiny else "imagenet.so_vit_14"
        found = measure.measure_bucket(
            folder, latency_ms=options.cluster.store_latency_ms, tiny=options.tiny
        )
        found |= measure.measure_checkpoint(recipe, folder=folder)
        found["block_ms"] = _BLOCK_MS
        if os.environ.get("RAY_ADDRESS"):
            found["block_ms"] = measure.measure_blocks(
                folder / "blocks", num_workers=options.num_gpus[0]
            )
    return found


def _main(arguments: Sequence[str]) -> None:
    options = parse(Options, arguments=arguments, prog=_PROG, text=__doc__)
    check_file(options.json, option="json")
    costs = read_costs(options.costs) if options.costs else measure_costs(options)
    costs["block_ms"] = options.block_ms or costs["block_ms"]
    trainings = trainings_of(options, costs=costs_of(costs))
    print("\n".join(f"{name} {value}" for name, value in costs.items()))
    print(table(trainings))
    content = {"machine": machine(), "options": str(options), "costs": costs}
    write_result(options.json, {**content, "trainings": trainings}, missing=[])


if __name__ == "__main__":
    run_command(_main, prog=_PROG)
