"""The optimiser's groups, timm's schedule by step, and the papers' schedules."""

from __future__ import annotations

import dataclasses
import re
from typing import Any, cast

import pytest
import timm
import torch
from timm.scheduler.cosine_lr import CosineLRScheduler
from torch import nn

from pipelines.config import Optim, Schedule
from pipelines.training.optimizer import (
    build_optimizer,
    current_learning_rate,
    learning_rate,
    set_learning_rate,
)

OPTIM = Optim(lr=1e-3, num_epochs=6, warmup_epochs=1.5, cooldown_epochs=2)
STEPS = 10


def test_parameters_of_one_dimension_are_not_decayed() -> None:
    model = timm.create_model("test_vit", num_classes=5)
    optim = dataclasses.replace(OPTIM, weight_decay=0.3, betas=(0.8, 0.95), eps=1e-7)
    optimizer = build_optimizer(model, optim=optim)
    decay = {
        id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]
    }
    kept = cast(Any, model).no_weight_decay()
    for name, parameter in model.named_parameters():
        free = parameter.ndim <= 1 or name.endswith(".bias") or name in kept
        assert decay.pop(id(parameter)) == (0.0 if free else 0.3), name
    assert not decay
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (1e-3, (0.8, 0.95), 1e-7)
    assert isinstance(optimizer, torch.optim.AdamW)


@pytest.mark.parametrize("warmup_epochs", [0, 1, 1.5, 6])
@pytest.mark.parametrize("cooldown_epochs", [0, 2])
def test_rates_are_timms_at_every_step(
    warmup_epochs: float, cooldown_epochs: int
) -> None:
    optim = dataclasses.replace(
        OPTIM, warmup_epochs=warmup_epochs, cooldown_epochs=cooldown_epochs
    )
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=optim.lr)
    theirs = CosineLRScheduler(
        optimizer,
        t_initial=optim.num_epochs * STEPS,
        lr_min=optim.min_lr,
        warmup_t=round(warmup_epochs * STEPS),
        warmup_lr_init=optim.warmup_lr,
        warmup_prefix=False,
        t_in_epochs=False,
    )
    for step in range(optim.total_epochs * STEPS + 3):
        theirs.step_update(step)
        found = learning_rate(step, optim=optim, steps_per_epoch=STEPS)
        assert found == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)


def test_the_schedule_starts_peaks_and_rests_where_it_should() -> None:
    def rate(step: int) -> float:
        return learning_rate(step, optim=OPTIM, steps_per_epoch=STEPS)

    assert rate(0) == OPTIM.warmup_lr
    rates = [rate(step) for step in range(OPTIM.total_epochs * STEPS)]
    assert max(rates) == rates[14]  # the warm-up's last step: the cosine began with it
    assert rates[15:61] == sorted(rates[15:61], reverse=True)
    assert set(rates[60:]) == {OPTIM.min_lr}


def test_setting_the_rate_sets_all_groups() -> None:
    optimizer = build_optimizer(nn.Linear(2, 2), optim=OPTIM)
    set_learning_rate(optimizer, lr=0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.5]


def rates(schedule: Schedule, *, epochs: list[float], **fields: Any) -> list[float]:
    """Give the rates at the beginning of epochs, and within them."""
    optim = Optim(**{"lr": 0.1, "num_epochs": 90, "warmup_epochs": 0, **fields})
    optim = dataclasses.replace(optim, schedule=schedule)
    steps = [round(epoch * STEPS) for epoch in epochs]
    return [learning_rate(step, optim=optim, steps_per_epoch=STEPS) for step in steps]


def test_steps_divide_at_their_milestones() -> None:
    schedule = Schedule(kind="step", milestones=(30, 45, 60))
    found = rates(schedule, epochs=[0, 29.9, 30, 44.9, 45, 60, 64.9])
    assert found == pytest.approx([0.1, 0.1, 0.01, 0.01, 1e-3, 1e-4, 1e-4])


def test_the_studys_schedules_are_its_formulas() -> None:
    fast = Schedule(kind="polynomial", power=11, end_epoch=53)
    found = rates(fast, epochs=[0, 0.9, 1, 20, 29.9], num_epochs=30)
    wanted = [0.1 * (1 - (e - 1) / 52) ** 11 for e in (0, 0, 1, 20, 29)]
    assert found == pytest.approx(wanted)
    assert found[0] == pytest.approx(0.123, abs=5e-4)
    adjusted = Schedule(kind="polynomial", power=2, end_epoch=50)
    found = rates(adjusted, epochs=[0, 49, 60], num_epochs=70)
    assert found == pytest.approx([0.1 * (50 / 49) ** 2, 0.1 * (1 / 49) ** 2, 0.0])
    mobile = Schedule(kind="exponential", gamma=0.98)
    found = rates(mobile, epochs=[0, 1.5, 10], lr=0.045, num_epochs=400)
    assert found == pytest.approx([0.045, 0.045 * 0.98, 0.045 * 0.98**10])


def test_piecewise_is_linear_between_its_points_and_stays_at_the_last() -> None:
    schedule = Schedule(
        kind="piecewise", milestones=(50, 100, 150), values=(1e-2, 1e-3, 1e-5)
    )
    found = rates(schedule, epochs=[0, 25, 50, 75, 150, 160], lr=6e-2, num_epochs=150)
    assert found == pytest.approx([6e-2, 3.5e-2, 1e-2, 5.5e-3, 1e-5, 1e-5])


def test_linear_falls_to_nothing_by_step_and_constant_does_not() -> None:
    linear = rates(Schedule(kind="linear"), epochs=[0, 22.5, 90, 95], lr=0.5)
    assert linear == pytest.approx([0.5, 0.375, 0, 0])
    assert rates(Schedule(kind="constant"), epochs=[0, 89]) == [0.1, 0.1]


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"kind": "step"}, "milestones"),
        ({"kind": "step", "milestones": (30, 20)}, "milestones"),
        ({"kind": "piecewise", "milestones": (30,)}, "values"),
        ({"kind": "polynomial"}, "end_epoch"),
        ({"gamma": 0}, "gamma"),
    ],
)
def test_schedules_that_mean_nothing_are_refused(
    fields: dict[str, Any], named: str
) -> None:
    with pytest.raises(ValueError, match=rf"optim\.schedule\.{named}"):
        Schedule(**fields)


def test_sgd_steps_as_the_papers_code_does() -> None:
    layer = nn.Linear(2, 1)
    optim = dataclasses.replace(
        OPTIM, optimizer="sgd", lr=0.1, weight_decay=0.01, decay_all=True
    )
    optimizer = build_optimizer(layer, optim=optim)
    bias, momentum = layer.bias.item(), 0.0
    for _ in range(3):
        optimizer.zero_grad()
        layer(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        momentum = 0.9 * momentum + 1.0 + 0.01 * bias
        bias -= 0.1 * momentum
    assert layer.bias.item() == pytest.approx(bias)


@pytest.mark.parametrize("name", ["test_resnet", "so_vit_7"])
@pytest.mark.parametrize("decay_all", [False, True])
def test_the_classifier_has_its_own_rate(name: str, decay_all: bool) -> None:
    kwargs: dict[str, Any] = {"depth": 1, "img_size": 32} if "so_vit" in name else {}
    model = timm.create_model(name, num_classes=5, **kwargs)
    optim = dataclasses.replace(OPTIM, classifier_lr_scale=5.0, decay_all=decay_all)
    optimizer = build_optimizer(model, optim=optim)
    set_learning_rate(optimizer, lr=0.2)
    rate = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
    decay = {
        id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]
    }
    assert optimizer.param_groups[0]["lr"] == 0.2
    fresh = ("fc", "head.fc_class", "head.fc_visual")
    for parameter_name, parameter in model.named_parameters():
        is_fresh = parameter_name.rpartition(".")[0] in fresh
        assert rate.pop(id(parameter)) == pytest.approx(1.0 if is_fresh else 0.2)
        decays = decay_all or parameter.ndim > 1 or parameter_name == "cls_token"
        assert decay[id(parameter)] == (optim.weight_decay if decays else 0.0)
    assert not rate


@pytest.mark.parametrize("decay_all", [False, True])
@pytest.mark.parametrize("name", ["so_vit_7", "deit_tiny_so", "test_vit"])
def test_layers_below_learn_more_slowly(name: str, decay_all: bool) -> None:
    """By powers of the factor: embedding, blocks one by one, head."""
    settings: dict[str, Any] = (
        {} if name == "test_vit" else {"depth": 3, "img_size": 64}
    )
    model = timm.create_model(name, num_classes=5, **settings)
    optim = dataclasses.replace(
        OPTIM, layer_decay=0.5, classifier_lr_scale=3.0, decay_all=decay_all
    )
    optimizer = build_optimizer(model, optim=optim)
    set_learning_rate(optimizer, lr=0.2)
    assert current_learning_rate(optimizer) == pytest.approx(0.2)
    groups = {id(p): g for g in optimizer.param_groups for p in g["params"]}
    num_blocks = 6 if name == "test_vit" else 3
    free = () if decay_all else cast(Any, model).no_weight_decay()
    for parameter_name, parameter in model.named_parameters():
        group = groups.pop(id(parameter))
        layer = re.search(r"blocks\.(\d+)", parameter_name)
        if re.search(
            r"(^|\.)(patch_embed|cls_token|pos_embed|reg_token)", parameter_name
        ):
            above = num_blocks + 1
        elif layer:
            above = num_blocks - int(layer[1])
        else:  # timm puts the last norm with the last block
            above = 1 if re.search(r"^(backbone\.)?norm\.", parameter_name) else 0
        fresh = parameter_name.startswith(("head.fc", "head.weight", "head.bias"))
        factor = 0.5**above * (3.0 if fresh else 1.0)
        assert group["lr"] == pytest.approx(0.2 * factor), parameter_name
        decays = decay_all or (parameter.ndim > 1 and parameter_name not in free)
        assert bool(group["weight_decay"]) == decays, parameter_name
    assert not groups
