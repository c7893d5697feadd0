"""Train the demo's So-ViT with few and many tokens, with and without its covariance.

    python -m benchmarks.token_gain --plot docs/second_order_tokens.png
    python -m benchmarks.token_gain --num-seeds 1 --num-epochs 2 --json result.json

The demo's photographs, model and way of training, for fewer epochs: one token for
16x16, 8x8 or 4x4 of the 32x32 pixels, and of each kind the class token alone and the
class token with the second-order head. Seeds change weights and the order of images,
and both heads have the same. One process, without Ray.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from benchmarks.family import Trained, describe_run, mean_spread, train_once
from benchmarks.report import machine
from pipelines.checkpoint import build_model
from pipelines.cli import parse, run_command
from pipelines.config import Run
from sovit.tokens import TOKEN_STRIDES

_PROG = "benchmarks.token_gain"
# As the head calls them: the class token alone, and both.
_FUSIONS = ("class", "sum")
Results = Mapping[int, Mapping[str, Sequence[Trained]]]
"""What was reached, by token stride and fusion, a seed each."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Say what is trained, and how long."""

    strides: tuple[int, ...] = TOKEN_STRIDES
    num_seeds: int = 3
    num_epochs: int = 3
    num_threads: int = 2
    json: Path | None = None
    """File for all figures, written after each training, and gone on with."""
    plot: Path | None = None
    """Picture of the gains."""

    def __post_init__(self) -> None:
        unknown = sorted(set(self.strides) - set(TOKEN_STRIDES))
        if unknown or not self.strides or self.num_seeds < 1:
            raise ValueError(
                f"expected strides of {TOKEN_STRIDES} and a seed at least, got "
                f"{self.strides} and {self.num_seeds}; set --strides and --num-seeds"
            )


def num_tokens(run: Run, *, stride: int) -> int:
    """Count the tokens of an image."""
    return (run.model.img_size // stride) ** 2


def build(run: Run, *, stride: int, fusion: str, num_classes: int) -> nn.Module:
    """Build the run's So-ViT with tokens of `stride` pixels a side."""
    kwargs = {**run.model.kwargs, "token_stride": stride, "fusion": fusion}
    settings = dataclasses.replace(run.model, kwargs=kwargs)
    return build_model(settings, num_classes=num_classes)


def gains(results: Results) -> dict[int, list[float]]:
    """Give the points of top-1 that the covariance adds, by stride, a seed each."""
    return {
        stride: [
            both.top1 - alone.top1
            for alone, both in zip(found["class"], found["sum"], strict=False)
        ]
        for stride, found in results.items()
    }


def table(results: Results, *, run: Run) -> str:
    """Draw the table: a line for each number of tokens."""
    lines = [f"{'tokens':>6}{'class token %':>18}{'second order %':>18}{'gain':>18}"]
    for stride, gained in gains(results).items():
        if not gained:
            continue
        tops = [
            mean_spread([one.top1 for one in results[stride][fusion]])
            for fusion in _FUSIONS
        ]
        lines.append(
            f"{num_tokens(run, stride=stride):>6}{tops[0]:>18}{tops[1]:>18}"
            f"{mean_spread(gained):>18}"
        )
    return "\n".join(lines)


def plot(path: Path, *, results: Results, run: Run) -> None:
    """Draw the gain against the number of tokens, each seed and their mean."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    by_tokens = sorted(
        (num_tokens(run, stride=stride), gained)
        for stride, gained in gains(results).items()
    )
    counts = [count for count, _ in by_tokens]
    for count, gained in by_tokens:
        axes.plot([count] * len(gained), gained, "o", color="C0", alpha=0.5)
    means = [statistics.mean(gained) for _, gained in by_tokens]
    axes.plot(counts, means, "-", color="C0", label="mean of the seeds")
    axes.axhline(0, color="gray", linewidth=0.8)
    pooling = run.model.pooling
    if pooling is not None:
        dim = min(pooling.reduced_dims)
        axes.axvline(dim, color="C3", linestyle=":", label=f"smaller dimension, {dim}")
    axes.set(xscale="log", xlabel="tokens", ylabel="second-order head, points of top-1")
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.xaxis.set_minor_formatter("")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=110)


def _main(arguments: Sequence[str]) -> None:
    options = parse(Options, arguments=arguments, prog=_PROG, text=__doc__)
    torch.set_num_threads(options.num_threads)
    run = describe_run(seed=0, num_epochs=options.num_epochs)
    results = _known(options)
    # They take turns, so that what was measured when it is stopped is of all kinds.
    work = [
        (seed, stride, fusion)
        for seed in range(options.num_seeds)
        for stride in options.strides
        for fusion in _FUSIONS
    ]
    work = [
        (seed, stride, fusion)
        for seed, stride, fusion in work
        if len(results[stride][fusion]) <= seed
    ]
    for seed, stride, fusion in tqdm(work, unit="training", disable=None):
        make = functools.partial(build, run, stride=stride, fusion=fusion)
        trained = train_once(make, seed=seed, num_epochs=options.num_epochs)
        results[stride][fusion].append(trained)
        if options.json:
            options.json.write_text(_as_json(results, options=options))
    print(table(results, run=run))
    if options.plot:
        plot(options.plot, results=results, run=run)


def _known(options: Options) -> dict[int, dict[str, list[Trained]]]:
    """Read what was measured before; nothing where there is no file."""
    empty = {stride: {fusion: [] for fusion in _FUSIONS} for stride in options.strides}
    if options.json is None or not options.json.exists():
        return empty
    content = json.loads(options.json.read_text())
    if content["options"] != _words(options):
        raise ValueError(
            f"expected figures of {_words(options)} in {options.json}, got those of "
            f"{content['options']}; choose another --json"
        )
    return {
        stride: {
            fusion: [Trained(**one) for one in content["strides"][str(stride)][fusion]]
            for fusion in _FUSIONS
        }
        for stride in options.strides
    }


def _words(options: Options) -> str:
    plain = dataclasses.replace(options, json=None, plot=None, num_threads=1)
    return str(plain)


def _as_json(results: Results, *, options: Options) -> str:
    content: dict[str, Any] = {
        "machine": machine(),
        "options": _words(options),
        "strides": {
            stride: {
                fusion: [asdict(one) for one in found] for fusion, found in of.items()
            }
            for stride, of in results.items()
        },
    }
    return json.dumps(content, indent=2) + "\n"


if __name__ == "__main__":
    run_command(_main, prog=_PROG)
