"""Show what runs out first: as tables in Markdown, as JSON, as a picture."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.scale.loads import Limit, first, speed
from benchmarks.scale.model import Case, Cluster, Costs, Kept
from benchmarks.scale.rates import host_bytes_per_s

_PLOTTED = 7  # as many lines as one can tell apart


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """Hold a training's limits, as its recipe sets it and as well as it can be set."""

    recipe: Case
    recipe_limits: list[Limit]
    advised: Case
    advised_limits: list[Limit]


def table(outlooks: Sequence[Outlook]) -> str:
    """Name the limit that is met first for each number of GPUs, set and rate.

    "Through" are the images a second of a GPU that all rates let through.
    """
    head = ("images/s a GPU", "images", "GPUs", "recipe: first", "load", "through")
    head += ("advised: first", "load", "through")
    rows = []
    for one in outlooks:
        rate = one.recipe.images_per_gpu_s
        cells = [f"{rate:,.0f}", f"{one.recipe.shards.num_images:,}"]
        cells.append(str(one.recipe.num_gpus))
        for limits in (one.recipe_limits, one.advised_limits):
            limit = first(limits)
            cells += [limit.name, _load(limit.load), f"{rate * speed(limits):,.0f}"]
        rows.append(cells)
    return markdown(head, rows)


def settings_table(outlooks: Sequence[Outlook]) -> str:
    """List the advised settings, and what Ray may then take for a block."""
    head = ("images/s a GPU", "images", "GPUs", "--data.num-readers")
    head += ("--data.shuffle-rows", "--data.read-ahead-mb")
    head += ("--validation.every-epochs", "shards", "MB a block")
    head += ("ms a block, at most", "with the recipe's settings")
    rows = []
    for one in outlooks:
        data = one.advised.run.data
        numbers = (data.num_readers, data.shuffle_rows, data.read_ahead_mb)
        rows.append(
            (
                f"{one.advised.images_per_gpu_s:,.0f}",
                f"{one.advised.shards.num_images:,}",
                f"{one.advised.num_gpus}",
                *(f"{number}" for number in numbers),
                f"{one.advised.run.validation.every_epochs}",
                f"{one.advised.shards.num_shards:,}",
                f"{one.advised.block_mb:,.1f}",
                f"{1000 / one.advised.blocks_per_s:,.2f}",
                f"{1000 / one.recipe.blocks_per_s:,.2f}",
            )
        )
    return markdown(head, rows)


def host_table(outlooks: Sequence[Outlook], *, cluster: Cluster, costs: Costs) -> str:
    """List what a host takes in; sets differ in nothing here, so the first one's."""
    head = ("images/s a GPU", "GPUs", "images/s a host", "MB/s of images, as they are")
    head += ("MB/s of small images", "MB/s of gradients")
    num_images = outlooks[0].recipe.shards.num_images
    rows = []
    for one in outlooks:
        if one.recipe.shards.num_images != num_images:
            continue
        was, gradients = host_bytes_per_s(one.recipe, cluster=cluster, costs=costs)
        now, _ = host_bytes_per_s(one.advised, cluster=cluster, costs=costs)
        per_host = one.recipe.images_per_s / cluster.num_hosts(one.recipe.num_gpus)
        numbers = (per_host, was / 1e6, now / 1e6, gradients / 1e6)
        rows.append(
            (
                f"{one.recipe.images_per_gpu_s:,.0f}",
                f"{one.recipe.num_gpus}",
                *(f"{number:,.0f}" for number in numbers),
            )
        )
    return markdown(head, rows)


def kept_table(
    kept: Sequence[Kept],
    *,
    num_gpus: int,
    cluster: Cluster,
    heard_s: float,
    minutes: float,
) -> str:
    """List what checkpoints cost, and what restoring takes out of a bucket.

    Training waits for the copy, and until the driver has heard; the share is theirs.
    """
    head = ("model", "MB", "copy s", f"share of {minutes:.0f} min", "write s")
    head += ("upload s", "check s", "load s", f"GB to {num_gpus} workers", "at GB/s")
    rows = []
    for one in kept:
        upload_s = one.num_mb / cluster.stream_mb_s
        share = (one.copy_s + heard_s) / (60 * minutes)
        rows.append(
            (
                one.model,
                f"{one.num_mb:,.0f}",
                f"{one.copy_s:.2f}",
                f"{share:.2%}",
                f"{one.write_s:.2f}",
                f"{upload_s:.1f}",
                f"{one.crc_s:.2f}",
                f"{one.load_s:.2f}",
                f"{num_gpus * one.num_mb / 1000:,.0f}",
                f"{num_gpus * cluster.stream_mb_s / 1000:,.1f}",
            )
        )
    return markdown(head, rows)


def loads_table(limits: Sequence[Limit]) -> str:
    """List all limits of one training, the first one first."""
    rows = [
        (
            limit.name,
            _load(limit.load),
            limit.needs,
            limit.has,
            ", ".join(limit.flags) or "no flag",
        )
        for limit in sorted(limits, key=lambda limit: -limit.load)
    ]
    return markdown(("resource", "load", "needs", "has", "what moves it"), rows)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Draw a table whose columns are as wide as what is in them."""
    lines = [head, *rows]
    widths = [max(len(line[at]) for line in lines) for at in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        padded = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
        return f"| {' | '.join(padded)} |"

    rule = f"| {' | '.join('-' * width for width in widths)} |"
    return "\n".join([line(head), rule, *map(line, rows)])


def _load(load: float) -> str:
    return f"{load:,.0f}" if load >= 10 else f"{load:.2g}"


def as_json(outlooks: Sequence[Outlook]) -> list[dict[str, Any]]:
    """Give every training's settings and loads."""
    return [
        {
            "num_gpus": one.recipe.num_gpus,
            "images_per_gpu_s": one.recipe.images_per_gpu_s,
            "num_images": one.recipe.shards.num_images,
            "recipe": _half(one.recipe, one.recipe_limits),
            "advised": _half(one.advised, one.advised_limits),
        }
        for one in outlooks
    ]


def _half(case: Case, limits: Sequence[Limit]) -> dict[str, Any]:
    return {
        "image_bytes": case.shards.image_bytes,
        "num_shards": case.shards.num_shards,
        "batch_size": case.run.data.batch_size,
        "shuffle_rows": case.run.data.shuffle_rows,
        "num_readers": case.run.data.num_readers,
        "images_per_block": case.images_per_block,
        "read_ahead_mb": case.run.data.read_ahead_mb,
        "validation_every_epochs": case.run.validation.every_epochs,
        "first": first(limits).name,
        "loads": {limit.name: float(f"{limit.load:.4g}") for limit in limits},
    }


def plot(
    path: Path,
    *,
    num_gpus: Sequence[int],
    title: str,
    panels: Mapping[str, Callable[[int], Sequence[Limit]]],
) -> None:
    """Draw loads against GPUs, a panel for each way to set a run.

    Args:
        panels: by their titles, what gives the limits at a number of GPUs.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.8), layout="constrained")
    all_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    found = {
        name: [{one.name: one.load for one in of(num)} for num in num_gpus]
        for name, of in panels.items()
    }
    names = _largest(found)
    for axes, (panel, loads) in zip(all_axes, found.items(), strict=True):
        for name in names:
            values = [at.get(name, 0.0) for at in loads]
            axes.plot(num_gpus, values, marker=".", label=name)
        axes.axhline(1, color="black", linewidth=1)
        axes.set(xscale="log", yscale="log", xlabel="GPUs", title=panel)
        axes.set_xticks(num_gpus, [str(num) for num in num_gpus])
        axes.xaxis.set_minor_formatter("")
        axes.set_ylim(bottom=0.01)
        axes.grid(alpha=0.3)
    figure.suptitle(title, fontsize="medium")
    all_axes[0].set_ylabel("load: 1 is all that there is")
    all_axes[-1].legend(fontsize="small", loc="upper left")
    figure.savefig(path, dpi=100)


def _largest(found: Mapping[str, list[dict[str, float]]]) -> list[str]:
    """Give the names of the resources with the highest loads, the highest first."""
    most: dict[str, float] = {}
    for loads in found.values():
        for name, load in loads[-1].items():
            most[name] = max(most.get(name, 0.0), load)
    return sorted(most, key=lambda name: -most[name])[:_PLOTTED]
