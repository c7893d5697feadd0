"""Say what a limit is: one resource's need against what there is.

A load of 1 is all that there is. Of rates, twice the load is half the speed. Of pauses
and of the start, which slow a run down a little however short they are, 1 is what
`Allowed` says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal["rate", "room", "pause", "start"]


@dataclass(frozen=True, kw_only=True)
class Allowed:
    """Say what pauses are worth to a user: a matter of taste."""

    pause_share: float = 0.05
    """Share of the time in which GPUs may stand still for one reason."""
    start_s: float = 600.0
    """From the command to the first step, Ray's and Python's own start left out."""


@dataclass(frozen=True, kw_only=True)
class Limit:
    """Set one resource's need against what there is."""

    name: str
    kind: Kind
    load: float
    """1 is all that there is."""
    needs: str
    has: str
    flags: tuple[str, ...] = ()
    """What moves it; none where nothing does."""


def first(limits: Sequence[Limit]) -> Limit:
    """Give what runs out first."""
    return max(limits, key=lambda limit: limit.load)


def speed(limits: Sequence[Limit]) -> float:
    """Give the share of the GPUs' images a second that all rates let through."""
    loads = [limit.load for limit in limits if limit.kind == "rate"]
    return 1 / max(1.0, *loads)
