"""The optimiser's groups, and timm's schedule by step."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import pytest
import timm
import torch
from timm.scheduler.cosine_lr import CosineLRScheduler
from torch import nn

from pipelines.config import Optim
from pipelines.optim import build_optimizer, learning_rate, set_learning_rate

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
