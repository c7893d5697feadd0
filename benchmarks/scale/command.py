"""Simulate the control plane at 8, 64 and 512 workers, and say what runs out first.

    python -m benchmarks.scale
    python -m benchmarks.scale --json result.json --plot scale.png
    python -m benchmarks.scale --costs result.json --images-per-gpu-s 2500

No GPU is needed. Plans, footers, units, the board, MLflow and checkpoints are the code
that trains, timed on this machine in about two minutes; a model sets what they cost
against what a cluster has, and prints the limit that each training meets first. With
RAY_ADDRESS, blocks and the board are timed on that Ray too. docs/scale.md explains it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.report import machine
from benchmarks.scale import report
from benchmarks.scale.limits import advised, limits_of
from benchmarks.scale.loads import Limit
from benchmarks.scale.measure import costs_of, measure
from benchmarks.scale.model import Case, Costs, Kept, run_at, shards_of
from benchmarks.scale.options import Options
from pipelines.cli import parse, run_command
from pipelines.outputs import check_file, check_plot

_PROG = "benchmarks.scale"
_MAX_SHARDS = 50_000  # that a set is advised to have
_PLOTTED_GPUS = (8, 16, 32, 64, 128, 256, 512)


def case_of(
    options: Options, *, num_gpus: int, num_images: int, images_per_gpu_s: float
) -> Case:
    """Describe a training as So-ViT-14's recipe sets it."""
    return Case(
        run=run_at(num_gpus, images_per_gpu=options.images_per_gpu),
        shards=shards_of(num_images, image_kb=options.image_kb),
        images_per_gpu_s=images_per_gpu_s,
        in_bucket=options.in_bucket,
    )


def outlook_of(case: Case, *, options: Options, costs: Costs) -> report.Outlook:
    """Work out a training's limits, and those of the best settings."""
    better = _advised(case, options=options, costs=costs)
    return report.Outlook(
        recipe=case,
        recipe_limits=_limits(case, options=options, costs=costs),
        advised=better,
        advised_limits=_limits(better, options=options, costs=costs),
    )


def _advised(case: Case, *, options: Options, costs: Costs) -> Case:
    small = shards_of(
        case.shards.num_images, image_kb=options.small_kb, max_shards=_MAX_SHARDS
    )
    return advised(
        case,
        shards=small,
        cluster=options.cluster,
        costs=costs,
        allowed=options.allowed,
    )


def _limits(case: Case, *, options: Options, costs: Costs) -> list[Limit]:
    return limits_of(
        case, cluster=options.cluster, costs=costs, allowed=options.allowed
    )


def read_costs(path: Path) -> Costs:
    """Read the costs of a result file; ValueError where there are none."""
    try:
        costs = json.loads(path.read_text())["costs"]
        return Costs(**costs | {"kept": Kept(**costs["kept"])})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"wanted a result that python -m benchmarks.scale --json wrote, came "
            f"{path} ({error!r}); leave out --costs to measure"
        ) from error


@contextlib.contextmanager
def _place(folder: Path | None) -> Iterator[Path]:
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        yield Path(temporary)


def _costs(options: Options) -> tuple[Costs, Sequence[Kept], dict[str, Any]]:
    """Measure, or read what was measured: the costs, all checkpoints', all figures."""
    if options.costs is not None:
        costs = read_costs(options.costs)
        costs = dataclasses.replace(costs, block_ms=options.block_ms or costs.block_ms)
        return costs, [costs.kept], {"costs_from": options.costs.name}
    with _place(options.folder) as folder:
        found = measure(options, folder=folder)
    print(
        f"meanwhile the rest of the machine was busy on {found.other_cores:.2f} cores\n"
    )
    costs = costs_of(found, block_ms=options.block_ms)
    return costs, found.kept, {"measured": asdict(found)}


def _show(
    outlooks: Sequence[report.Outlook],
    *,
    kept: Sequence[Kept],
    options: Options,
    costs: Costs,
) -> None:
    last = outlooks[-1]
    tables = {
        "What runs out first": report.table(outlooks),
        "What is advised": report.settings_table(outlooks),
        "What a host takes in": report.host_table(
            outlooks, cluster=options.cluster, costs=costs
        ),
        "Checkpoints": report.kept_table(
            kept,
            num_gpus=max(options.num_gpus),
            cluster=options.cluster,
            heard_s=costs.heard_s,
            minutes=last.recipe.run.checkpoint_every_minutes,
        ),
        "The last training, as its recipe sets it": report.loads_table(
            last.recipe_limits
        ),
        "The last training, as advised": report.loads_table(last.advised_limits),
    }
    print("\n\n".join(f"{title}\n\n{table}" for title, table in tables.items()))


def _plot(path: Path, *, options: Options, costs: Costs) -> None:
    """Draw the largest set's loads at the middle rate."""
    rates = sorted(options.images_per_gpu_s)
    rate = rates[len(rates) // 2]

    def of_recipe(num_gpus: int) -> list[Limit]:
        return _limits(_case(num_gpus), options=options, costs=costs)

    def of_advised(num_gpus: int) -> list[Limit]:
        better = _advised(_case(num_gpus), options=options, costs=costs)
        return _limits(better, options=options, costs=costs)

    def _case(num_gpus: int) -> Case:
        return case_of(
            options,
            num_gpus=num_gpus,
            num_images=max(options.num_images),
            images_per_gpu_s=rate,
        )

    title = f"{max(options.num_images):,} images, {rate:,.0f} images/s a GPU"
    report.plot(
        path,
        num_gpus=_PLOTTED_GPUS,
        title=title,
        panels={"as the recipe sets it": of_recipe, "as advised": of_advised},
    )


def _main(arguments: Sequence[str]) -> None:
    options = parse(Options, arguments=arguments, prog=_PROG, text=__doc__)
    check_file(options.json, option="json")
    check_plot(options.plot)
    costs, kept, figures = _costs(options)
    outlooks = [
        outlook_of(
            case_of(options, num_gpus=gpus, num_images=images, images_per_gpu_s=rate),
            options=options,
            costs=costs,
        )
        for rate in options.images_per_gpu_s
        for images in options.num_images
        for gpus in options.num_gpus
    ]
    _show(outlooks, kept=kept, options=options, costs=costs)
    if options.plot:
        _plot(options.plot, options=options, costs=costs)
    if options.json:
        shown = dataclasses.replace(options, json=None, plot=None, folder=None)
        content = {"machine": machine(), "options": str(shown)} | figures
        content |= {"costs": asdict(costs), "trainings": report.as_json(outlooks)}
        options.json.write_text(json.dumps(content, indent=2) + "\n")


def main() -> None:
    """Run the command line."""
    run_command(_main, prog=_PROG)
