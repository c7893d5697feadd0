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
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from torch import nn

from benchmarks import trainings
from benchmarks.trainings import Results, mean_spread, train_all
from pipelines.cli.command import parse, run_command
from pipelines.cli.outputs import check_plot
from pipelines.config import Model
from pipelines.training.model import build_model
from recipes.demo import demo
from sovit.tokens import TOKEN_STRIDES

_PROG = "benchmarks.token_gain"
# As the head calls them: the class token alone, and both.
_FUSIONS = ("class", "sum")


@dataclass(frozen=True, kw_only=True)
class Options(trainings.Options):
    """What is trained, and how long."""

    num_epochs: int = 3
    strides: tuple[int, ...] = TOKEN_STRIDES
    plot: Path | None = None
    """Picture of the gains."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.strides or not set(self.strides) <= set(TOKEN_STRIDES):
            raise ValueError(
                f"expected strides of {TOKEN_STRIDES}, got {self.strides}; "
                "set --strides"
            )


def num_tokens(stride: int) -> int:
    """Count the tokens of an image."""
    return (demo().model.img_size // stride) ** 2


def name_of(stride: int, fusion: str) -> str:
    """Return a training's name in the results."""
    return f"stride {stride}, {fusion}"


def build(model: Model, stride: int, fusion: str, num_classes: int) -> nn.Module:
    """Build a So-ViT with tokens of `stride` pixels a side."""
    kwargs = {**model.kwargs, "token_stride": stride, "fusion": fusion}
    settings = dataclasses.replace(model, kwargs=kwargs)
    return build_model(settings, num_classes=num_classes)


def gains(results: Results, *, strides: Sequence[int]) -> dict[int, list[float]]:
    """Return the top-1 points that the covariance adds, by stride, one per seed."""
    found = {}
    for stride in strides:
        alone, both = (results[name_of(stride, fusion)] for fusion in _FUSIONS)
        pairs = zip(alone, both, strict=False)
        found[stride] = [second.top1 - first.top1 for first, second in pairs]
    return found


def table(results: Results, *, strides: Sequence[int]) -> str:
    """Format a line per number of tokens."""
    rows = {}
    for stride, gained in gains(results, strides=strides).items():
        row = {
            f"{fusion} %": mean_spread(
                [it.top1 for it in results[name_of(stride, fusion)]]
            )
            for fusion in _FUSIONS
        }
        rows[num_tokens(stride)] = {**row, "gain": mean_spread(gained)}
    return pd.DataFrame(rows).T.rename_axis("tokens").to_string()


def plot(path: Path, *, results: Results, strides: Sequence[int]) -> None:
    """Plot the gain against the number of tokens, each seed and their mean."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    found = gains(results, strides=strides)
    by_tokens = {num_tokens(stride): found[stride] for stride in sorted(found)[::-1]}
    counts = list(by_tokens)
    for count, gained in by_tokens.items():
        axes.plot([count] * len(gained), gained, "o", color="C0", alpha=0.5)
    means = [statistics.mean(gained) for gained in by_tokens.values()]
    axes.plot(counts, means, "-", color="C0", label="mean of the seeds")
    axes.axhline(0, color="gray", linewidth=0.8)
    if (pooling := demo().model.pooling) is not None:
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
    check_plot(options.plot)
    builds = {
        name_of(stride, fusion): functools.partial(build, demo().model, stride, fusion)
        for stride in options.strides
        for fusion in _FUSIONS
    }
    results = train_all(builds, options=dataclasses.replace(options, plot=None))
    print(table(results, strides=options.strides))
    if options.plot:
        plot(options.plot, results=results, strides=options.strides)


if __name__ == "__main__":
    run_command(_main, prog=_PROG)
