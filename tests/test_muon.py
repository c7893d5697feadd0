"""Muon for hidden matrices, AdamW for the rest, and no step where it is flagged."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from pipelines.config import Optim, Scale
from pipelines.training.optimizer import FOUND_INF, build_optimizer, set_learning_rate
from tests.fault_runs import brief_run

OPTIM = Optim(lr=1e-2, num_epochs=6, optimizer="muon", weight_decay=0.1)


def with_gradients() -> nn.Module:
    torch.manual_seed(1)
    model = timm.create_model("so_vit_7", num_classes=5, depth=1, img_size=32)
    model(torch.randn(4, 3, 32, 32)).square().sum().backward()
    return model


@pytest.mark.parametrize("classifier_lr_scale", [1.0, 3.0])
def test_matrices_turn_and_the_rest_steps_as_adamw(classifier_lr_scale: float) -> None:
    optim = dataclasses.replace(OPTIM, classifier_lr_scale=classifier_lr_scale)
    models = [with_gradients(), with_gradients()]
    before = copy.deepcopy(dict(models[0].named_parameters()))
    for model, name in zip(models, ("muon", "adamw"), strict=True):
        optimizer = build_optimizer(
            model,
            optim=dataclasses.replace(optim, optimizer=name),
        )
        set_learning_rate(optimizer, lr=1e-3)
        optimizer.step()
    ours, adamws = (dict(model.named_parameters()) for model in models)
    turned = set()
    for name, parameter in ours.items():
        if torch.allclose(parameter, adamws[name], rtol=1e-5, atol=1e-7):
            continue
        turned.add(name)
        step = (before[name] * (1 - 1e-3 * 0.1) - parameter).flatten(1) / 1e-3
        # In the gradient's directions, however large it is in each, the step is one.
        values = torch.linalg.svdvals(step) / (0.2 * max(step.shape) ** 0.5)
        assert 0.7 < values[3] <= values[0] < 1.3
        assert parameter.grad is not None
        gradient = torch.linalg.svdvals(parameter.grad.flatten(1))
        assert gradient[0] / gradient[3] > values[0] / values[3]
    assert {"blocks.0.attn.qkv.weight", "blocks.0.mlp.fc1.weight"} < turned
    assert "head.pool.reduction.weight" in turned
    assert not any(name.startswith("head.fc_") for name in turned)
    assert all(ours[name].ndim > 1 for name in turned)


def test_a_flagged_step_leaves_everything_as_it_was() -> None:
    model = with_gradients()
    before = copy.deepcopy(model.state_dict())
    optimizer = build_optimizer(model, optim=OPTIM)
    setattr(optimizer, FOUND_INF, torch.ones(()))
    optimizer.step()
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert not optimizer.state
    setattr(optimizer, FOUND_INF, torch.zeros(()))
    optimizer.step()
    assert not torch.equal(model.state_dict()["cls_token"], before["cls_token"])


def test_shards_are_refused(tmp_path: Path) -> None:
    run = brief_run(tmp_path, num_epochs=1, optimizer="muon")
    with pytest.raises(ValueError, match="muon, which needs whole matrices"):
        dataclasses.replace(run, scale=Scale(num_workers=2, sharding="fsdp"))
