"""Settings that a sweep tries, where they are known before it begins."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from tuning.trials.options import Search
from tuning.trials.spaces import Space, choices_of, draw

# Draws that find nothing new, one after the other, until a space counts as used up.
_MAX_IN_VAIN = 1000


def list_settings(space: Space, *, search: Search) -> list[dict[str, Any]]:
    """List the settings of a random or a grid search, no two alike.

    The same seed draws the same settings; more trials extend the same list.
    Raises ValueError where the space has fewer, or for a grid over a domain that is
    not a list of choices.
    """
    if search.method == "grid":
        return _grid(space)[: search.num_trials]
    generator = np.random.RandomState(search.sample_seed)
    found: dict[str, dict[str, Any]] = {}
    num_in_vain = 0
    while len(found) < search.num_trials:
        setting = draw(space, generator=generator)
        num_in_vain = num_in_vain + 1 if repr(setting) in found else 0
        found.setdefault(repr(setting), setting)
        if num_in_vain == _MAX_IN_VAIN:
            raise ValueError(
                f"wanted {search.num_trials} settings, came a space of {len(found)}; "
                f"set --num-trials {len(found)}, or widen the space"
            )
    return list(found.values())


def _grid(space: Space) -> list[dict[str, Any]]:
    values = {name: choices_of(domain) for name, domain in space.items()}
    ranges = [name for name, choices in values.items() if choices is None]
    if ranges:
        raise ValueError(
            f"wanted choices for a grid, came a range for {', '.join(ranges)}; write "
            "tune.choice([...]) there, or take --method random"
        )
    lists = [choices or [] for choices in values.values()]
    return [
        dict(zip(values, choices, strict=True)) for choices in itertools.product(*lists)
    ]


def spread(numbers: list[int], *, num: int) -> list[int]:
    """Pick `num` numbers spread evenly from the first to the last."""
    if num >= len(numbers):
        return list(numbers)
    places = np.linspace(0, len(numbers) - 1, num).round().astype(int)
    return [numbers[place] for place in dict.fromkeys(places.tolist())]
