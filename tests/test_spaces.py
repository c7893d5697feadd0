"""Spaces fit their recipes; draws are the seed's alone; what is wrong is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ray import tune

from pipelines.config.overrides import change_fields
from pipelines.config.recipes import load_recipe
from recipes.demo import demo
from tuning.spaces import check_space, list_settings, load_space, shipped, words_of
from tuning.trials.head_trial import spread
from tuning.trials.options import Search

RECIPES = ("demo", "imagenet.sot_tiny", "gcp.mpncov_resnet50", "gcp.isqrt_resnet50")

UNFIT = {
    ("power", "gcp.isqrt_resnet50"),
    ("iterations", "gcp.mpncov_resnet50"),
    ("singular_values", "gcp.mpncov_resnet50"),
    ("singular_values", "gcp.isqrt_resnet50"),
    *(("heads", recipe) for recipe in RECIPES if recipe != "imagenet.sot_tiny"),
}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", shipped())
def test_a_shipped_space_fits_a_recipe_or_says_why_not(recipe: str, name: str) -> None:
    run = load_recipe(recipe)
    if (name, recipe) in UNFIT:
        with pytest.raises(ValueError, match=r"^expected a recipe w"):
            load_space(name, run=run)
        return
    space = load_space(name, run=run)
    for setting in list_settings(space, search=Search(num_trials=3)):
        assert change_fields(run, setting) != run or len(space) == 1


def test_the_recipes_have_what_is_searched() -> None:
    def fields(recipe: str) -> set[str]:
        return set(load_space("pooling", run=load_recipe(recipe)))

    svpn = {"pooling.power", "pooling.num_iterations", "pooling.reduced_dim"}
    assert fields("demo") == svpn
    assert fields("imagenet.sot_tiny") == svpn | {"pooling.num_heads"}
    assert fields("gcp.isqrt_resnet50") == svpn - {"pooling.power"}
    assert fields("gcp.mpncov_resnet50") == svpn - {"pooling.num_iterations"}


def test_the_same_seed_draws_the_same_and_more_begin_with_the_same() -> None:
    space = load_space("pooling,optim", run=demo())

    def draws(num: int, seed: int) -> list[dict[str, Any]]:
        return list_settings(space, search=Search(num_trials=num, sample_seed=seed))

    assert draws(5, 1) == draws(12, 1)[:5]
    assert draws(5, 1) != draws(5, 2)
    assert len({repr(setting) for setting in draws(12, 1)}) == 12


def test_each_setting_of_a_grid_is_tried_with_three_seeds() -> None:
    space = load_space("reduced_dim,seeds", run=demo())
    grid = list_settings(space, search=Search(method="grid"))
    by_dims: dict[Any, list[int]] = {}
    for setting in grid:
        by_dims.setdefault(setting["pooling.reduced_dim"], []).append(setting["seed"])
    assert len(by_dims) == 4
    assert set(map(tuple, by_dims.values())) == {(42, 43, 44)}


def test_a_grid_has_all_combinations_and_a_space_can_be_used_up() -> None:
    space = {
        "pooling.power": tune.grid_search([0.3, 0.5]),
        "pooling.reduced_dim": tune.choice([(24, 12), (48, 24), (12, 6)]),
    }
    check_space(space, run=demo())
    grid = list_settings(space, search=Search(method="grid"))
    assert len(grid) == len({repr(setting) for setting in grid}) == 6
    drawn = list_settings(space, search=Search(num_trials=6))
    assert sorted(map(repr, drawn)) == sorted(map(repr, grid))
    with pytest.raises(ValueError, match="a space of 6; set --num-trials 6"):
        list_settings(space, search=Search(num_trials=7))
    range_of = {"optim.lr": tune.loguniform(1e-4, 1e-2)}
    with pytest.raises(ValueError, match=r"a range for optim\.lr"):
        list_settings(range_of, search=Search(method="grid"))


@pytest.mark.parametrize(
    ("space", "said"),
    [
        ({"pooling.powr": tune.choice([1])}, r"near it are model\.pooling\.power"),
        ({"pooling.power": tune.uniform(0.5, 2)}, "at most 1"),
        ({"pooling.num_iterations": tune.uniform(1, 3)}, "expected int"),
        ({"pooling.power": tune.choice([])}, "got none"),
        ({"optim.lr": 0.1}, "expected a domain of ray.tune"),
        ({"scale.num_workers": tune.choice([1, 2])}, "change what is learnt"),
        ({"storage": tune.choice(["a", "b"])}, "change what is learnt"),
    ],
)
def test_a_bad_space_is_refused_before_anything_starts(
    space: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        check_space(space, run=demo())


def test_a_space_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "space.py"
    file.write_text(
        "from ray import tune\n"
        "def narrow(run): return {'optim.lr': tune.uniform(run.optim.lr, 1.0)}\n"
        "def fixed(): return {'seed': tune.randint(0, 9)}\n"
        "def empty(): return {}\n"
        "def wrong(): return 3\n"
    )
    space = load_space(f"{file}:narrow,{file}:fixed", run=demo())
    words = {"optim.lr": "uniform (0.002, 1.0)", "seed": "uniform (0, 9)"}
    assert words_of(space) == words
    for name, said in [("empty", "got an empty one"), ("wrong", "returns a dict")]:
        with pytest.raises(ValueError, match=said):
            load_space(f"{file}:{name}", run=demo())
    for name, said in [
        ("nix", "expected a"),
        (f"{file}:nix", "expected a"),
        (f"{tmp_path}/nix.py:narrow", "expected a Python file"),
    ]:
        with pytest.raises(ValueError, match=said):
            load_space(name, run=demo())


def test_numbers_are_spread_from_first_to_last() -> None:
    assert spread([3, 1, 4, 1, 5], num=2) == [3, 5]
    assert spread(list(range(10)), num=4) == [0, 3, 6, 9]
    assert spread([1, 2], num=5) == [1, 2]
