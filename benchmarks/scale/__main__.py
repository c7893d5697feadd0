"""Estimate what runs out first in a large run, from costs that were measured.

    python -m benchmarks.scale
    python -m benchmarks.scale --images-per-gpu-s 2500 --num-gpus 16

The costs are those of docs/scale.md, which has the tables, and what is assumed. A
block's, on which most of it hangs, is measured on the Ray of RAY_ADDRESS with
`--measure-blocks FOLDER`.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.rounds import write_result
from benchmarks.scale.blocks import measure_blocks
from benchmarks.scale.model import Case, Costs, Settings, loads_of
from pipelines.cli.command import parse, run_command
from pipelines.cli.outputs import check_file

_PROG = "benchmarks.scale"
_RESULTS = Path(__file__).parents[1] / "results"
RESULT = _RESULTS / "scale_epyc-2-cores_2026-11-27.json"


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
    measure_blocks: Path | None = None
    """A new folder that all machines of the Ray see: a block is measured there."""
    json: Path | None = None

    def __post_init__(self) -> None:
        asked = (self.num_gpus, self.num_images, self.images_per_gpu_s)
        if not all(of and min(of) > 0 for of in asked):
            raise ValueError(
                f"expected GPUs, sets and rates, got {asked}; set --num-gpus, "
                "--num-images or --images-per-gpu-s"
            )


def read_costs(path: Path) -> Costs:
    """Read the costs of a result file."""
    found = json.loads(path.read_text())["costs"]
    found |= found["kept"]  # a checkpoint's
    return Costs(**{of.name: found[of.name] for of in dataclasses.fields(Costs)})


def trainings_of(options: Options, *, costs: Costs) -> list[dict[str, Any]]:
    """List each training's settings, and its load on each resource."""
    same = {of.name: getattr(options, of.name) for of in dataclasses.fields(Settings)}
    asked = (options.images_per_gpu_s, options.num_images, options.num_gpus)
    trainings = []
    for rate, num_images, num_gpus in itertools.product(*asked):
        case = Case(
            num_gpus=num_gpus, num_images=num_images, images_per_gpu_s=rate, **same
        )
        trainings.append({**asdict(case), "loads": loads_of(case, costs=costs)})
    return trainings


def table(trainings: Sequence[dict[str, Any]]) -> str:
    """Format a line per training: its loads, and the largest."""
    asked = pd.DataFrame(trainings)[["images_per_gpu_s", "num_images", "num_gpus"]]
    loads = pd.DataFrame([training["loads"] for training in trainings])
    shown = pd.concat([asked, loads, loads.idxmax(axis=1).rename("first")], axis=1)
    return shown.to_string(index=False, float_format="{:.2g}".format)


def _main(arguments: Sequence[str]) -> None:
    options = parse(Options, arguments=arguments, prog=_PROG, text=__doc__)
    check_file(options.json, option="json")
    costs, block_ms = read_costs(RESULT), options.block_ms
    if options.measure_blocks:
        block_ms = measure_blocks(
            options.measure_blocks, num_workers=options.num_gpus[0]
        )
    if block_ms:
        costs = dataclasses.replace(costs, block_ms=block_ms)
    trainings = trainings_of(options, costs=costs)
    print("\n".join(f"{name} {value}" for name, value in asdict(costs).items()))
    print(table(trainings))
    content = {"options": str(options), "costs": asdict(costs), "trainings": trainings}
    write_result(options.json, content, missing=[])


if __name__ == "__main__":
    run_command(_main, prog=_PROG)
