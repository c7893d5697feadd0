"""Recipes name networks that there are, and train them as the papers' code does."""

from __future__ import annotations

import dataclasses
import importlib
import math
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn

from pipelines.config import Model, Run
from pipelines.config.recipes import load_recipe, recipes_of
from pipelines.config.serialization import from_json, to_json
from pipelines.training.model import build_model
from pipelines.training.optimizer import learning_rate
from sovit import SoViT

ROOT = Path(__file__).parents[1]


# Recipes of ours: no paper says how they train.
OURS = ("demo.demo", "finetune.folder")


def names() -> list[str]:
    modules = sorted(path.stem for path in (ROOT / "recipes").glob("[!_]*.py"))
    return [
        f"{module}.{name}"
        for module in modules
        for name in recipes_of(importlib.import_module(f"recipes.{module}"))
    ]


@cache
def built(settings: str) -> nn.Module:
    """Build each network once, without memory; settings are a run's JSON."""
    with torch.device("meta"):
        return build_model(from_json(settings).model, num_classes=10)


def network(run: Run, **changes: object) -> nn.Module:
    """Build a run's network at 224 pixels, so that recipes share it."""
    model = dataclasses.replace(run.model, init_from="", **changes)  # pyright: ignore
    if "finetune" in run.recipe:
        model = dataclasses.replace(model, img_size=224)
    bare = dataclasses.replace(load_recipe("demo"), model=model)
    return built(to_json(bare))


def test_every_paper_of_the_family_has_its_recipes() -> None:
    trained = {load_recipe(name).model.name for name in names()}
    assert {f"isqrt_resnet{depth}" for depth in (18, 34, 50, 101)} <= trained
    assert {f"eca_resnet{depth}" for depth in (18, 34, 50, 101, 152)} <= trained
    assert {"mpncov_resnet50", "mpncov_resnet101", "gaussian_resnet50"} <= trained
    assert {"isqrt_vgg16", "isqrt_mobilenetv2", "eca_mobilenetv2"} <= trained
    assert {"gsop_resnet50_1", "gsop_resnet50_2", "so_vit_7", "sot_tiny"} <= trained
    assert {f"{net}_so" for net in ("deit_tiny", "deit_base", "swin_tiny")} <= trained


@pytest.mark.parametrize("name", names())
def test_a_recipe_builds_its_network_with_the_networks_own_pooling(name: str) -> None:
    run = load_recipe(name)
    model = network(run, pooling=None)
    assert sum(p.numel() for p in model.parameters()) > 0
    if run.model.pooling is not None:
        assert run.model.pooling == model.get_submodule("head.pool").pooling
    assert from_json(to_json(run)) == run


def test_the_demo_pools_as_many_tokens_as_a_covariance_needs() -> None:
    said: list[str] = []
    model = build_model(load_recipe("demo").model, num_classes=10, tell=said.append)
    assert isinstance(model, SoViT)
    assert math.prod(model.grid_size) >= 49
    assert not said


PAPERS = [name for name in names() if name not in OURS]


@pytest.mark.parametrize("name", PAPERS)
def test_a_recipe_keeps_its_batch_on_gpus_that_its_header_names(name: str) -> None:
    run = load_recipe(name)
    scale, num = run.scale, run.scale.num_workers
    assert scale.use_gpu
    assert scale.compile == "auto"
    assert num * run.micro_batch_size * run.optim.num_accumulation == (
        run.data.batch_size
    )
    assert 128 <= run.micro_batch_size <= 256 or num == 1
    assert scale.cpus_per_worker == run.data.num_decode_threads + 1
    header = importlib.import_module(f"recipes.{name.split('.')[0]}").__doc__ or ""
    hardware = header.partition("Hardware: ")[2].partition("\n\n")[0]
    word = {1: "one", 2: "two", 3: "three"}.get(num, str(num))
    assert word in hardware.split(" GB ")[0].replace(",", "").split()
    assert "bfloat16" in hardware
    assert "Hours: not published, and not measured" in " ".join(hardware.split())


# Rates of the first epoch, of one on the way, and of the last.
RATES = {
    "gcp.mpncov_resnet50": {0: 0.0631, 30: 6.31e-3, 89: 6.31e-4},
    "gcp.isqrt_resnet50": {0: 0.1, 45: 1e-3, 64: 1e-4},
    "gcp.isqrt_mobilenetv2": {0: 0.045, 1: 0.0441, 399: 0.045 * 0.98**399},
    "attention.gsop_resnet50_1": {0: 0.1, 89: 1e-3, 94: 1e-4},
    "attention.gsop_resnet50_2": {0: 0.1, 45: 1e-3, 64: 1e-4},
    "attention.eca_resnet101": {0: 0.1, 60: 1e-3, 99: 1e-4},
    "gcp_study.resnet18_gap_norm": {0: 0.1, 30: 0.01, 99: 1e-4},
    "gcp_study.resnet50_gcp_fast": {0: 0.123, 1: 0.1, 29: 0.1 * (24 / 52) ** 11},
    "gcp_study.resnet101_gcp_adjusted": {0: 0.104, 1: 0.1, 49: 0.1 / 49**2},
    "gcp_study.mobilenetv2_gap_fast": {0: 0.06, 1: 0.0552, 99: 0.06 * 0.92**99},
    "gcp_study.mobilenetv2_gcp_adjusted": {0: 0.06, 50: 0.01, 100: 1e-3},
    "finetune.isqrt_resnet50_birds": {0: 1.2e-3, 99: 1.2e-3},
    "finetune.isqrt_vgg16_cars": {0: 3e-3, 19: 3e-3, 39: 3e-4},
}


@pytest.mark.parametrize("name", RATES)
def test_rates_are_the_papers(name: str) -> None:
    optim = load_recipe(name).optim
    for epoch, wanted in RATES[name].items():
        rate = learning_rate(10 * epoch, optim=optim, steps_per_epoch=10)
        # The study's first epoch is given to three digits.
        assert rate == pytest.approx(wanted, rel=5e-3 if wanted > 0.1 else 1e-6)
    assert optim.total_epochs > max(RATES[name])


@pytest.mark.parametrize("name", [n for n in names() if n.split(".")[0] != "imagenet"])
def test_convolutional_networks_are_trained_by_plain_sgd(name: str) -> None:
    run = load_recipe(name)
    if name in OURS or name.startswith("deit_swin"):
        assert run.optim.optimizer == "adamw"
        return
    optim = run.optim
    assert (optim.optimizer, optim.momentum, optim.decay_all) == ("sgd", 0.9, True)
    assert optim.weight_decay == (4e-5 if "mobilenet" in name else 1e-4)
    none = {optim.label_smoothing, optim.mixup, optim.cutmix, optim.ema_decay}
    assert none == {0.0}
    assert not run.augment.auto_augment
    assert optim.warmup_epochs == run.augment.re_prob == 0


@pytest.mark.parametrize("name", [n for n in PAPERS if n.startswith("finetune")])
def test_fine_tuning_starts_from_weights_and_looks_at_the_mirror(name: str) -> None:
    run = load_recipe(name)
    assert run.model.init_from
    assert run.data.eval_mirror
    assert run.optim.classifier_lr_scale == (20 if "vgg" in name else 5)
    assert run.model.img_size == (512 if "mpncov" in name and "air" in name else 448)
    start = load_recipe(f"gcp.{run.model.name}")
    wanted = Model(name=start.model.name, pooling=start.model.pooling)
    assert dataclasses.replace(run.model, init_from="", img_size=224) == wanted


@pytest.mark.parametrize("name", names())
def test_a_published_figure_stands_in_the_modules_header(name: str) -> None:
    top1 = load_recipe(name).published_top1
    header = importlib.import_module(f"recipes.{name.split('.')[0]}").__doc__ or ""
    if top1 is None:
        assert name in (*OURS, "gcp.gaussian_resnet50")
        return
    cells = {cell.strip() for line in header.splitlines() for cell in line.split("|")}
    assert {str(top1), f"{top1:.2f}"} & cells
