"""Time every second-order head, forward and backward, ours beside the straightforward.

    python -m benchmarks.heads
    python -m benchmarks.heads --compile --json result.json
    python -m benchmarks.heads --rounds 0 --plot costs.png

The straightforward version is the same mathematics in PyTorch's operations with its
autograd (`benchmarks/straightforward.py`). Both are checked against each other first.
The rounds of both take turns. Kept memory is what the backward pass needs, in multiples
of the input. Then a head's share of a whole training step of its network.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tqdm import tqdm

from benchmarks.head_cases import Case, cases, curves
from benchmarks.head_rounds import Result, case_name, compare, kept, step_ms
from benchmarks.machine import machine
from benchmarks.result_file import write_result
from benchmarks.step_share import Share, measure_share
from pipelines.cli.command import parse, run_command
from pipelines.cli.outputs import check_file, check_plot

_PROG = "benchmarks.heads"
_CURVE_DIMS = (32, 64, 128, 192, 256, 384, 512)


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
    steps: tuple[str, ...] = ("so_vit_14", "isqrt_resnet50")
    """Models of whose training step the head's share is measured."""
    step_batch_size: int = 8
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


def share_text(share: Share) -> str:
    """Format the head's share of a step."""
    return (
        f"{share.model}, batch {share.batch_size}, {share.dtype}: "
        f"a step {share.step_ms:,.0f} ms, "
        f"its head {share.head_ms:,.1f} ms: {share.head_ms / share.step_ms:.2%}"
    )


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
    """Time all cases and steps; write and print the results after each."""
    shown = str(dataclasses.replace(options, json=None, plot=None))
    content: dict[str, Any] = {"machine": machine(), "options": shown}
    work: dict[str, Callable[[], Result | Share]] = {
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
    for name in options.steps:
        work[name] = functools.partial(
            measure_share, name, batch_size=options.step_batch_size, device=device
        )
    found: dict[str, Result | Share] = {}
    missing = list(work)
    try:
        for name, measure in tqdm(work.items(), unit="case", disable=None):
            found[name] = measure()
            missing.remove(name)
            for part, kind in (("heads", Result), ("steps", Share)):
                of_part = [asdict(it) for it in found.values() if isinstance(it, kind)]
                content[part] = of_part
            write_result(options.json, content, missing=missing)
    finally:
        print(table([one for one in found.values() if isinstance(one, Result)]))
        for one in found.values():
            if isinstance(one, Share):
                print(share_text(one))
        if missing:
            print(f"not measured: {'; '.join(missing)}", file=sys.stderr)


if __name__ == "__main__":
    run_command(_main, prog=_PROG)
