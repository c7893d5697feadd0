"""Coefficients of the coupled iteration for square roots: the papers', and better ones.

For each eigenvalue x^2 of A = S / t the iteration starts at s = x, and every step takes
s to s (a + b s^2). The root comes out as sqrt(t) x s: s - 1 is its relative error.
Newton-Schulz takes a = 3/2, b = -1/2 in every step, which is best near s = 1 and slow
far from it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

from sovit.shapes import Number

Coefficients: TypeAlias = tuple[tuple[float, float], ...]
"""The pair (a, b) of every step."""

COEFFICIENTS = ("newton_schulz", "minimax")
NEWTON_SCHULZ_STEP = (1.5, -0.5)
# The first step is made for an interval that ends here instead of at 1. With it the
# smallest roots below, to two digits, leave the result rising in every eigenvalue: else
# that of a matrix with one dominant direction has a gradient of the wrong sign.
SAFETY = 1.05
_LOWER = (0.54, 0.28, 0.125, 0.08, 0.04, 0.02)


def minimax_coefficients(
    num_iterations: int, *, lower: Number | None = None, max_gain: Number | None = None
) -> Coefficients:
    """Find the steps whose result is nearest to the root on an interval.

    Among all sequences of steps s (a + b s^2) these have the smallest largest error
    |s_N - 1| for s_0 in [lower, 1]: each step's cubic equioscillates around 1 on what
    the one before left of the interval, and greedy steps are the best together (known
    for the matrix sign: Chen and Chow; Polar Express, arXiv 2505.16932). No paper of
    covariance pooling has them. Below `lower` a root comes out too small, never of the
    wrong sign, as everywhere with Newton-Schulz.

    Args:
        lower: The smallest sqrt(eigenvalue / t) that is to come out right. By default
            the smallest that keeps the result rising in each eigenvalue: 0.125, 0.08,
            0.04, 0.02 for 3 to 6 steps.
        max_gain: Instead of `lower`: the largest that `gain` of the steps may be.

    Raises ValueError for settings out of range, or both.
    """
    if lower is not None and max_gain is not None:
        raise ValueError(
            "expected one of lower and max_gain, which both choose the interval, got "
            f"lower={lower} and max_gain={max_gain}; give one of them"
        )
    if max_gain is not None:
        return _of_gain(num_iterations, max_gain)
    if lower is None:
        lower = _default_lower(num_iterations)
    if not 0 < lower < 1:
        raise ValueError(
            f"lower: expected a number between 0 and 1, got {lower}; take 0.02 to 0.5"
        )
    low, high = float(lower), 1.0
    steps: list[tuple[float, float]] = []
    for _ in range(num_iterations):
        # Of the cubic's inner maximum on [low, high].
        square = (low**2 + low * high + high**2) / 3
        cube = square**1.5
        c = 2 / (2 * cube + low * high * (low + high))
        steps.append((3 * square * c, -c))
        low, high = c * low * high * (low + high), 2 * c * cube
    (a, b), *rest = steps
    return (a / SAFETY, b / SAFETY**3), *rest


def gain(steps: Sequence[tuple[float, float]]) -> float:
    """Return by how much steps multiply the smallest eigenvalues of A: the slope at 0.

    It is the largest that the gradient can grow by on its way back to A: 1.5^N of
    Newton-Schulz, some 10, 19, 42 and 94 of the default minimax steps for N = 3 to 6,
    infinite of the exact root.
    """
    return math.prod(a for a, _ in steps)


def find_coefficients(
    num_iterations: int,
    *,
    coefficients: str | Coefficients = "newton_schulz",
    max_gain: Number | None = None,
) -> Coefficients:
    """Return the steps that a name stands for; steps given are returned as they are.

    Raises ValueError for unknown names and for settings that do not fit together.
    """
    if num_iterations < 1:
        raise ValueError(
            f"num_iterations: expected at least 1, got {num_iterations}; the papers "
            "take 3 to 5"
        )
    if max_gain is not None and coefficients != "minimax":
        raise ValueError(
            "max_gain: expected minimax coefficients, which it bounds, got "
            f"coefficients={coefficients!r}; set coefficients='minimax', or leave it "
            "out"
        )
    if coefficients == "minimax":
        return minimax_coefficients(num_iterations, max_gain=max_gain)
    if coefficients == "newton_schulz":
        return (NEWTON_SCHULZ_STEP,) * num_iterations
    if isinstance(coefficients, str) or len(coefficients) != num_iterations:
        raise ValueError(
            f"coefficients: expected one of {COEFFICIENTS} or {num_iterations} pairs, "
            f"one for each iteration, got {coefficients!r}; see minimax_coefficients"
        )
    return tuple((float(a), float(b)) for a, b in coefficients)


def _default_lower(num_iterations: int) -> float:
    known = _LOWER[: max(num_iterations, 1)]
    return known[-1] / 2 ** (max(num_iterations, 1) - len(known))


def _of_gain(num_iterations: int, max_gain: Number) -> Coefficients:
    """Find the steps for the smallest `lower` whose gain is at most `max_gain`."""
    least, most = 0.0, math.nextafter(1.0, 0.0)
    bound = gain(minimax_coefficients(num_iterations, lower=most))
    if not bound <= max_gain:
        raise ValueError(
            f"max_gain: expected at least {bound:.3g} for {num_iterations} iterations, "
            f"got {max_gain}; raise it, or take fewer iterations"
        )
    while (middle := (least + most) / 2) not in (least, most):
        if gain(minimax_coefficients(num_iterations, lower=middle)) <= max_gain:
            most = middle
        else:
            least = middle
    return minimax_coefficients(num_iterations, lower=most)
