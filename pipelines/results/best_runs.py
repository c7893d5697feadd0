"""Find each recipe's best run among those in MLflow."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipelines.config import Run
from pipelines.config.serialization import flat_params
from pipelines.tracking import value_text
from pipelines.tracking.query import StoredRun

_RECIPE = "recipe"
_TOP1 = "val/top1"
# What decides the accuracy that a recipe is published with.
_SETTINGS = ("model.", "pooling.", "optim.", "augment.")
_ALSO = frozenset({"data.batch_size", "data.crop_pct", "data.eval_interpolation"})
_KWARGS = "model.kwargs."
# Where the weights lie that a training starts from, and how it bears bad steps.
_FREE = frozenset(
    {
        "model.init_from",
        "model.init_triangle",
        "optim.on_nonfinite",
        "optim.max_nonfinite_steps",
    }
)


@dataclass(frozen=True, kw_only=True)
class Best:
    """The best finished run of a recipe."""

    top1: float
    """Percent, at the run's end."""
    name: str
    run_id: str
    has_other_settings: bool
    """Whether it differs from the recipe in settings that affect accuracy."""
    num_runs: int
    """Finished runs of the recipe, whatever their settings."""


def by_recipe(runs: Sequence[StoredRun]) -> dict[str, list[StoredRun]]:
    """Group runs that measured an accuracy by recipe."""
    found: dict[str, list[StoredRun]] = {}
    for run in runs:
        recipe = run.params.get(_RECIPE) or run.tags.get(_RECIPE)
        if recipe and math.isfinite(run.metrics.get(_TOP1, math.nan)):
            found.setdefault(recipe, []).append(run)
    return found


def best_of(runs: Sequence[StoredRun], *, recipe: Run) -> Best | None:
    """Select the best run, preferring those with the recipe's own settings."""
    if not runs:
        return None
    wanted = _settings(recipe)

    def rank(run: StoredRun) -> tuple[bool, float]:
        return _is_same(run, wanted=wanted), run.metrics[_TOP1]

    best = max(runs, key=rank)
    return Best(
        top1=best.metrics[_TOP1],
        name=best.name,
        run_id=best.run_id,
        has_other_settings=not rank(best)[0],
        num_runs=len(runs),
    )


def _settings(recipe: Run) -> dict[str, str]:
    flat = {name: value_text(value) for name, value in flat_params(recipe).items()}
    chosen = {
        name: text
        for name, text in flat.items()
        if (name.startswith(_SETTINGS) or name in _ALSO) and name not in _FREE
    }
    # A run without a second-order head has this one in place of all of `pooling.`.
    return chosen | {"pooling": flat.get("pooling", "")}


def _is_same(run: StoredRun, *, wanted: Mapping[str, str]) -> bool:
    is_built_so = all(name in wanted for name in run.params if name.startswith(_KWARGS))
    # What a run of an earlier version does not name was as it is by default now.
    return is_built_so and all(
        run.params.get(name, text) == text for name, text in wanted.items()
    )
