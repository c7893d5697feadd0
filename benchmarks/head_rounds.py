"""Time a head and its straightforward version in turns, forward and backward."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.head_cases import Case
from benchmarks.timing import Spread, call_ms, ratios, spread


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
