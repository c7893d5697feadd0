"""The best run of a recipe is the best with its settings, or of the others."""

from __future__ import annotations

import dataclasses
import math

import pytest

from pipelines.config import Run
from pipelines.config.recipes import load_recipe
from pipelines.config.serialization import flat_params
from pipelines.results.best_runs import Best, best_of, by_recipe
from pipelines.tracking.entries import value_text
from pipelines.tracking.query import StoredRun

RECIPE = "imagenet.so_vit_7"


def stored(run: Run, top1: float, *, name: str = "a", **params: str) -> StoredRun:
    texts = {key: value_text(value) for key, value in flat_params(run).items()}
    return StoredRun(
        run_id=name,
        name=name,
        status="FINISHED",
        params=texts | {key.replace("__", "."): text for key, text in params.items()},
        tags={},
        metrics={"val/top1": top1},
        start_s=0.0,
        end_s=1.0,
    )


def test_the_best_run_with_the_recipes_settings_goes_before_others() -> None:
    run = load_recipe(RECIPE)
    runs = [
        stored(run, 70.0, name="own"),
        stored(run, 75.0, name="elsewhere", data__train="/a", scale__num_workers="2"),
        stored(run, 78.0, name="longer", optim__num_epochs="600"),
    ]
    found = best_of(runs, recipe=run)
    assert found == Best(
        top1=75.0,
        name="elsewhere",
        run_id="elsewhere",
        has_other_settings=False,
        num_runs=3,
    )
    only = best_of(runs[2:], recipe=run)
    assert only is not None
    assert only.has_other_settings
    assert best_of([], recipe=run) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"data__batch_size": "64"},
        {"pooling__power": "0.25"},
        {"model__kwargs__depth": "2"},
        {"augment__re_prob": "0.0"},
        {"pooling": "None"},
    ],
)
def test_what_accuracy_depends_on_are_other_settings(changes: dict[str, str]) -> None:
    run = load_recipe(RECIPE)
    found = best_of([stored(run, 1.0, **changes)], recipe=run)
    assert found is not None
    assert found.has_other_settings


def test_a_run_of_a_version_without_a_setting_had_its_default() -> None:
    run = load_recipe(RECIPE)
    before = stored(run, 1.0)
    params = {k: v for k, v in before.params.items() if k != "optim.decay_all"}
    found = best_of([dataclasses.replace(before, params=params)], recipe=run)
    assert found is not None
    assert not found.has_other_settings


def test_runs_are_sorted_by_recipe_and_those_without_accuracy_left_out() -> None:
    run = load_recipe(RECIPE)
    tagged = dataclasses.replace(stored(run, 3.0), params={}, tags={"recipe": "x"})
    runs = [stored(run, 1.0), stored(run, math.nan), stored(run, 2.0), tagged]
    runs.append(dataclasses.replace(runs[0], metrics={}))
    found = by_recipe(runs)
    assert {key: len(of) for key, of in found.items()} == {RECIPE: 2, "x": 1}
