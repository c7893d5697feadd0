"""Time every second-order head, forward and backward, ours beside the straightforward.

    python -m benchmarks.heads
    python -m benchmarks.heads --compile --json result.json
    python -m benchmarks.heads --rounds 0 --plot costs.png

Both are checked against each other first, and take turns. Kept memory is what the
backward pass needs, in multiples of the input.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.benchmark import Timer
from tqdm import tqdm

from benchmarks.head_cases import Case, Function, cases, curves
from benchmarks.rounds import Frame, Record, run_rounds, shown_spread
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
    json: Path | None = None
    """File for all figures."""
    plot: Path | None = None
    """File for a picture of time and memory against channels, PNG."""


def compare(case: Case, *, compiled: bool, round_s: float, device: str) -> Record:
    """Time both versions of a case.

    Raises AssertionError if they do not agree, or ours is further off what both
    approximate.
    """
    x = case.input(device)
    _check(case, x)
    functions = [case.ours, case.plain]
    ours_kept, plain_kept = (kept(function, x) for function in functions)
    if compiled:
        functions = [_compiled(function) for function in functions]
    ours_ms, plain_ms = (step_ms(of, x, round_s=round_s) for of in functions)
    times = {"ours_ms": ours_ms, "plain_ms": plain_ms, "speedup": plain_ms / ours_ms}
    return {**times, "ours_kept": ours_kept, "plain_kept": plain_kept}


@functools.cache
def _compiled(function: Function) -> Function:
    """Compile a function once for all rounds."""
    return torch.compile(function)


def _check(case: Case, x: Tensor) -> None:
    ours, plain = case.ours(x), case.plain(x)
    if case.exact is None:
        torch.testing.assert_close(ours, plain, rtol=1e-2, atol=1e-2)
        return
    exact = case.exact(x)
    assert torch.dist(ours, exact) <= torch.dist(plain, exact), case.name


def step_ms(function: Function, x: Tensor, *, round_s: float) -> float:
    """Measure the median time of forward and backward, over `round_s` or one call."""
    leaf = x.clone().requires_grad_()
    weight = torch.randn_like(function(leaf))  # compiles, too
    timer = Timer(
        "grad(function(leaf), leaf, weight)",
        globals={
            "grad": torch.autograd.grad,
            "function": function,
            "leaf": leaf,
            "weight": weight,
        },
        num_threads=torch.get_num_threads(),
    )
    return 1000 * timer.blocked_autorange(min_run_time=round_s).median


def kept(function: Function, x: Tensor) -> float:
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


def table(records: Frame) -> str:
    """Format a line per case: both versions' medians, and their ratio."""
    by_case = records.groupby("case", sort=False)
    shown = by_case.median(numeric_only=True).drop(columns=["round", "other_cores"])
    shown["speedup"] = by_case["speedup"].apply(shown_spread, ".2f")
    return shown.to_string(float_format="{:.2f}".format)


def plot(path: Path, *, options: Options, device: str) -> None:
    """Plot time and kept memory against channels, for 196 tokens."""
    from matplotlib.figure import Figure

    batch_size = options.batch_size
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, function in tqdm(curves().items(), unit="curve", disable=None):
        times, sizes = [], []
        for dim in _CURVE_DIMS:
            shape = (batch_size, 196, dim)
            case = Case(name=name, ours=function, plain=function, shape=shape)
            x = case.input(device)
            spent_ms = step_ms(function, x, round_s=options.round_s)
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
        run_rounds(
            _measures(options, device=device),
            num_rounds=options.rounds,
            options=options,
            path=options.json,
            table=table,
        )
    if options.plot:
        plot(options.plot, options=options, device=device)


def _measures(options: Options, *, device: str) -> dict[str, Callable[[], Record]]:
    return {
        f"{case.name}{', compiled' * compiled}": functools.partial(
            compare, case, compiled=compiled, round_s=options.round_s, device=device
        )
        for compiled in ((False, True) if options.compile else (False,))
        for case in cases(options.batch_size, device=device)
    }


if __name__ == "__main__":
    run_command(_main, prog=_PROG)
