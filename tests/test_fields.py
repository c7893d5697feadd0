"""Fields of a run change by their dotted names, or are refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from pipelines.config.overrides import change_fields, differing
from recipes.demo import demo


def test_fields_change_together_and_nothing_else_does() -> None:
    # Alone either would be refused: two singular values need a reduced_dim of two.
    setting = {"pooling.num_singular_values": 30, "pooling.reduced_dim": (64, 32)}
    fields = {**setting, "optim.lr": 1, "model.kwargs.depth": 3, "seed": 7}
    run = change_fields(demo(), fields)
    assert differing(demo(), run) == fields
    assert change_fields(demo(), {}) == demo()


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"pooling.powr": 0.5}, r"model\.pooling\.powr.*model\.pooling\.power"),
        ({"lr": 0.5}, "'lr'"),
        ({"optim.lr.more": 0.5}, r"optim\.lr can hold optim\.lr\.more"),
        ({"optim.lr": "much"}, r"optim\.lr: expected float, got 'much'"),
        ({"optim.num_epochs": 2.0}, r"optim\.num_epochs: expected int"),
        ({"optim.num_epochs": True}, r"optim\.num_epochs: expected int"),
        ({"pooling.reduced_dim": (1, 2, 3)}, r"reduced_dim: expected"),
        ({"pooling.normalizer": "fast"}, r"normalizer: expected"),
        ({"pooling.power": 1.5}, "at most 1"),
        ({"optim.betas": (0.9, 1.5)}, r"optim\.betas"),
    ],
)
def test_what_does_not_fit_is_named(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        change_fields(demo(), fields)


def test_a_run_without_pooling_takes_none_of_its_fields() -> None:
    plain = change_fields(demo(), {"model.pooling": None})
    with pytest.raises(ValueError, match=r"model\.pooling = None"):
        change_fields(plain, {"pooling.power": 0.5})
