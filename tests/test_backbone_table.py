"""The table of timm's backbones is what the sweep finds, and the sweep finds faults."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import sovit
from benchmarks.backbones import (
    architectures,
    enliven,
    judge,
    line_of,
    table,
    try_architecture,
)

PAGE = Path(__file__).parents[1] / "docs" / "backbones.md"
QUICK = ("test_mambaout", "test_resnet", "test_vit", "test_vit2")


def rows() -> list[str]:
    return [line for line in PAGE.read_text().splitlines() if "| `" in line]


def test_the_table_has_every_module_and_nothing_wrong() -> None:
    names = [line.split("`")[1] for line in rows()]
    assert sorted(names) == sorted(architectures())
    assert len(names) >= 110
    modules = {line.split(" | ")[0].removeprefix("| ") for line in rows()}
    of_timm = {
        module
        for module in timm.list_modules()
        for name in timm.list_models(module=module)[:1]
        if timm.models.model_entrypoint(name).__module__.startswith("timm.")
    }
    assert len(of_timm) >= 90
    assert of_timm <= modules
    assert not [line for line in rows() if "WRONG" in line]


@pytest.mark.parametrize("name", QUICK)
def test_small_backbones_are_read_as_the_table_says(name: str) -> None:
    assert line_of(try_architecture(name)) in rows()


@pytest.mark.slow
def test_all_backbones_are_read_as_the_table_says() -> None:
    found = [try_architecture(name) for name in architectures()]
    assert table(found).splitlines() == PAGE.read_text().splitlines()


def test_the_sweep_finds_what_is_read_wrongly() -> None:
    images = torch.randn(2, 3, 96, 96)
    plain = timm.create_model("test_vit", img_size=96, num_classes=0)
    plain = enliven(plain, images=images)
    model = sovit.second_order(
        timm.create_model("test_vit", img_size=96, num_classes=0),
        pooling={"type": "cross_cov", "reduced_dim": (6, 4)},
        fusion="visual",
        num_classes=3,
    ).eval()
    assert "features are not" in judge(model, plain, images=images).faults[0]
    model.backbone.load_state_dict(plain.state_dict())
    verdict = judge(model, plain, images=images)
    assert verdict.faults == ()
    assert verdict.evidence == ("map", "head")
    for changes in (
        {"num_prefix_tokens": 0, "has_class_token": False},
        {"num_prefix_tokens": 2},
        {"has_class_token": False},
    ):
        right = model.features
        model.features = dataclasses.replace(right, **changes)
        assert judge(model, plain, images=images).faults
        model.features = right
    nn.init.zeros_(model.backbone.patch_embed.proj.weight)
    faults = judge(model, plain, images=images).faults
    assert "logits are the same for different images" in faults
