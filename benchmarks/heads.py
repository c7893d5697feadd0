"""Time every second-order head, forward and backward, ours beside the straightforward.

    python -m benchmarks.heads
    python -m benchmarks.heads --compile --json result.json
    python -m benchmarks.heads --rounds 0 --plot costs.png

The straightforward version is the same mathematics in PyTorch's operations with its
autograd (`benchmarks/straightforward.py`). Both are checked against each other first.
The rounds of both take turns. Kept memory is what the backward pass needs, in multiples
of the input.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.head_cases import Case, cases, curves
from benchmarks.machine import machine
from benchmarks.result_file import write_result
from benchmarks.timing import Spread, call_ms, ratios, spread
from pipelines.cli.command import parse, run_command
from pipelines.cli.outputs import check_file, check_plot

_PROG = "benchmarks.heads"
_CURVE_DIMS = (32, 64, 128, 192, 256, 384, 512)


@dataclass(frozen=True, kw_only=True)
class Result:
    """A case's result: milliseconds, speedup and kept memory."""

    name: str
    ours_ms: Spread
    straightforward_ms: Spread
    speedup: Spread
    ours_kept: float
    """Bytes kept for the backward pass, in multiples of the input's."""
    straightforward_kept: float


def compare(
    case: Case, *, num_rounds: int, round_s: float, compiled: bool, device: str
) -> Result:
    """Time both versions of a case in turns.

    Raises AssertionError if they do not agree, or ours is further off what both
    approximate.
    """
    x = case.input(device)
    ours, other = case.ours, case.straightforward
    _check(case, x)
    kept_ours, kept_other = kept(ours, x), kept(other, x)
    if compiled:
        ours, other = torch.compile(ours), torch.compile(other)
    weight = torch.randn_like(case.ours(x))
    mine, theirs = [], []
    for seen in range(num_rounds + 1):
        times = [
            step_ms(function, x, weight, round_s=round_s) for function in (ours, other)
        ]
        # The first round warms up, and compiles.
        if seen:
            mine.append(times[0])
            theirs.append(times[1])
    return Result(
        name=case_name(case, compiled=compiled),
        ours_ms=spread(mine),
        straightforward_ms=spread(theirs),
        speedup=ratios(theirs, mine),
        ours_kept=kept_ours,
        straightforward_kept=kept_other,
    )


def _check(case: Case, x: Tensor) -> None:
    ours, other = case.ours(x), case.straightforward(x)
    if case.exact is None:
        torch.testing.assert_close(ours, other, rtol=1e-2, atol=1e-2)
        return
    exact = case.exact(x)
    assert torch.dist(ours, exact) <= torch.dist(other, exact), case.name


def case_name(case: Case, *, compiled: bool) -> str:
    """Return a case's name in the results."""
    return f"{case.name}{', compiled' if compiled else ''}"


def step_ms(
    function: Callable[[Tensor], Tensor], x: Tensor, weight: Tensor, *, round_s: float
) -> float:
    """Measure the median time of forward and backward, over `round_s` or one call."""
    times: list[float] = []
    while not times or sum(times) < 1000 * round_s:
        leaf = x.clone().requires_grad_()

        def both(leaf: Tensor = leaf) -> None:
            function(leaf).backward(weight)

        times.append(call_ms(both, device=x.device.type))
    return statistics.median(times)


def kept(function: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """Count the bytes kept for the backward pass, in multiples of the input's."""
    sizes: dict[int, int] = {}
    alive: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function(x.clone().requires_grad_())
    return sum(sizes.values()) / x.nbytes


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is timed, and how long."""

    batch_size: int = 32
    rounds: int = 7
    """0 leaves out the comparison."""
    round_s: float = 0.5
    """A round of one function goes on for so long, or once."""
    num_threads: int = 2
    compile: bool = False
    """Also compile the straightforward version and ours."""
    json: Path | None = None
    """File for all figures."""
    plot: Path | None = None
    """File for a picture of time and memory against channels, PNG."""


def table(results: Sequence[Result]) -> str:
    """Format a line per case: both versions, and their ratio."""
    rows = {
        found.name: {
            "ours ms": f"{found.ours_ms.median:.2f}",
            "plain ms": f"{found.straightforward_ms.median:.2f}",
            "times as fast": found.speedup.shown(".2f"),
            "kept: ours": f"{found.ours_kept:.1f}",
            "plain": f"{found.straightforward_kept:.1f}",
        }
        for found in results
    }
    return pd.DataFrame(rows).T.to_string()


def plot(path: Path, *, options: Options, device: str) -> None:
    """Plot time and kept memory against channels, for 196 tokens."""
    from matplotlib.figure import Figure

    batch_size = options.batch_size
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, function in tqdm(curves().items(), unit="curve", disable=None):
        times, sizes = [], []
        for dim in _CURVE_DIMS:
            case = Case(
                name=name,
                ours=function,
                straightforward=function,
                shape=(batch_size, 196, dim),
            )
            x = case.input(device)
            weight = torch.randn_like(function(x))
            spent_ms = step_ms(function, x, weight, round_s=options.round_s)
            times.append(spent_ms / batch_size)
            sizes.append(kept(function, x) * x.nbytes / batch_size / 2**20)
        left.plot(_CURVE_DIMS, times, marker="o", label=name)
        right.plot(_CURVE_DIMS, sizes, marker="o", label=name)
    left.set_ylabel("ms an image, forward and backward")
    right.set_ylabel("MiB an image, kept for the backward pass")
    for axes in (left, right):
        axes.set(xscale="log", yscale="log", xlabel="channels d, 196 tokens")
        axes.set_xticks(_CURVE_DIMS, [str(dim) for dim in _CURVE_DIMS])
        axes.xaxis.set_minor_formatter("")
        axes.grid(alpha=0.3)
    left.legend(fontsize="small")
    figure.savefig(path, dpi=110)


def _main(arguments: Sequence[str]) -> None:
    options = parse(Options, arguments=arguments, prog=_PROG, text=__doc__)
    check_file(options.json, option="json")
    check_plot(options.plot)
    torch.set_num_threads(options.num_threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.rounds:
        _measure(options, device=device)
    if options.plot:
        plot(options.plot, options=options, device=device)


def _measure(options: Options, *, device: str) -> None:
    """Time all cases; write and print the results after each."""
    shown = str(dataclasses.replace(options, json=None, plot=None))
    content: dict[str, Any] = {"machine": machine(), "options": shown}
    work = {
        case_name(case, compiled=mode): functools.partial(
            compare,
            case,
            num_rounds=options.rounds,
            round_s=options.round_s,
            compiled=mode,
            device=device,
        )
        for mode in ((False, True) if options.compile else (False,))
        for case in cases(options.batch_size, device=device)
    }
    found: list[Result] = []
    missing = list(work)
    try:
        for name, measure in tqdm(work.items(), unit="case", disable=None):
            found.append(measure())
            missing.remove(name)
            content["heads"] = [asdict(result) for result in found]
            write_result(options.json, content, missing=missing)
    finally:
        print(table(found))
        if missing:
            print(f"not measured: {'; '.join(missing)}", file=sys.stderr)


if __name__ == "__main__":
    run_command(_main, prog=_PROG)
