"""Parameters, multiply-adds and memory are counted without making any of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipelines.config import Run, Scale
from pipelines.config.recipes import load_recipe
from pipelines.dry_run.activation_memory import StepMemory, measure_step
from pipelines.dry_run.memory import Memory, checkpoint_bytes, estimate_memory
from pipelines.training.metrics import soft_cross_entropy
from pipelines.training.model import (
    build_model,
    count_macs,
    count_parameters,
    count_training_macs,
    shapes_of,
)
from tests.small_runs import PLAIN_VIT, SO_VIT, small_run, state_of


class Products(nn.Module):
    """Multiplies 2x2 matrices, of 3 channels, in every way that has a name."""

    def forward(self, x: Tensor) -> Tensor:
        """Give the sum of one of each: x is (B, 3, 2, 2)."""
        batch, square, vector = x[0], x[0, 0], x[0, 0, 0]
        found = {
            "mm": square @ square,
            "bmm": torch.bmm(batch, batch),
            "baddbmm": torch.baddbmm(batch, batch, batch),
            "addbmm": torch.addbmm(square, batch, batch),
            "mv": square @ vector,
            "addmv": torch.addmv(vector, square, vector),
            "dot": vector @ vector,
            "vdot": torch.vdot(vector, vector),
            "einsum": torch.einsum("bij,bjk->bik", batch, batch),
            "gram": batch.mT @ batch,
        }
        return torch.stack([value.sum() for value in found.values()]).sum()


def test_every_product_of_matrices_counts() -> None:
    square = 2 * 2 * 2
    wanted = square + 3 * square * 5 + 2 * 4 + 2 * 2
    assert count_macs(Products(), img_size=2) == wanted


def test_a_convolution_in_groups_counts_by_the_group_backward_too() -> None:
    """PyTorch's own formula takes it for a whole one."""
    forward = 5 * 5 * (3 * 3) * 6 + 5 * 5 * 6
    with torch.device("meta"):
        grouped = nn.Conv2d(3, 6, 3, groups=3, padding=1)
        model = nn.Sequential(grouped, nn.Conv2d(6, 1, 1))
    assert count_macs(model, img_size=5) == forward
    # The images need no gradient.
    assert count_training_macs(model, img_size=5) == 3 * forward - 5 * 5 * 9 * 6


@pytest.mark.parametrize(
    ("name", "millions", "giga"),
    [
        ("so_vit_7", 5.53, 1.42),
        ("so_vit_10", 7.11, 1.79),
        ("so_vit_14", 24.64, 5.05),
        ("so_vit_19", 43.80, 8.75),
        ("sot_tiny", 7.98, 2.75),
        ("sot_small", 27.01, 6.21),
        ("sot_base", 76.77, 15.52),
    ],
)
def test_the_seven_models_have_the_released_codes_counts(
    name: str, millions: float, giga: float
) -> None:
    """Counted from the released layers, products of attention included."""
    model = shapes_of(load_recipe(f"imagenet.{name}").model, num_classes=1000)
    if name.startswith("sot"):
        # Ours pools before the three transitions' convolutions, which saves 3/4.
        full = 160 * 128 * 112**2 + 224 * 128 * (56**2 + 28**2)
        giga -= 3 / 4 * full / 1e9
    assert round(count_parameters(model).num / 1e6, 2) == millions
    assert count_macs(model, img_size=224) / 1e9 == pytest.approx(giga, abs=0.006)


def test_parameters_are_counted_once_by_the_parts_that_hold_them() -> None:
    with torch.device("meta"):
        model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.BatchNorm1d(3)})
        model["c"] = model["a"]
        model["b"].requires_grad_(False)
    found = count_parameters(model)
    assert dict(found.groups) == {"a": 12, "b": 6}
    assert (found.num, found.num_trained) == (18, 12)
    assert (found.num_bytes, found.num_trained_bytes) == (72, 48)
    assert found.num_buffer_bytes == 2 * 3 * 4 + 8


def test_the_trunk_under_a_head_of_ours_is_told_apart() -> None:
    model = shapes_of(load_recipe("gcp.isqrt_resnet18").model, num_classes=10)
    assert {"backbone.layer1", "backbone.layer4", "head"} <= set(
        count_parameters(model).groups
    )


def step_run(model: Any = SO_VIT, **optim: Any) -> Run:
    return small_run("none", model=model, **optim)


@contextmanager
def saved(model: nn.Module, *others: Tensor) -> Iterator[list[int]]:
    """Collect the sizes of what autograd saves, but for the model's own."""
    found: dict[int, tuple[Tensor, int]] = {}
    known = {
        t.untyped_storage()._cdata for t in (*model.state_dict().values(), *others)
    }

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            found[storage._cdata] = (tensor, storage.nbytes())
        return tensor

    sizes: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield sizes
    sizes += [size for _, size in found.values()]


@pytest.mark.parametrize("use_bfloat16", [False, True])
@pytest.mark.parametrize("model", [SO_VIT, PLAIN_VIT], ids=["so_vit", "vit"])
def test_a_step_without_memory_keeps_what_autograd_saves_in_a_real_one(
    model: Any, use_bfloat16: bool
) -> None:
    run = step_run(model)
    found = measure_step(run, num_classes=3, batch_size=4, use_bfloat16=use_bfloat16)
    real = build_model(run.model, num_classes=3).train()
    size = run.model.img_size
    images, targets = torch.randn(4, 3, size, size), torch.rand(4, 3)
    images = images.to(memory_format=torch.channels_last)
    with saved(real, images, targets) as sizes:
        with torch.autocast("cpu", torch.bfloat16, enabled=use_bfloat16):
            logits = real(images)
        soft_cross_entropy(logits, targets)
    # BatchNorm keeps statistics in float32 that fake tensors have in bfloat16.
    assert found.kept == pytest.approx(sum(sizes), rel=5e-3)
    assert found.peak >= found.kept


def test_mixing_keeps_a_second_batch_and_checkpointing_less() -> None:
    arguments = {"num_classes": 3, "batch_size": 8, "use_bfloat16": False}
    run = step_run(PLAIN_VIT)
    plain = measure_step(run, **arguments)
    mixed = measure_step(step_run(PLAIN_VIT, mixup=0.2), **arguments)
    assert mixed.kept - plain.kept == 8 * 3 * 16 * 16 * 4
    run = dataclasses.replace(run, scale=Scale(grad_checkpointing=True))
    assert measure_step(run, **arguments).kept < plain.kept / 2
    shapes = [
        shapes_of(PLAIN_VIT, num_classes=3, grad_checkpointing=is_on)
        for is_on in (False, True)
    ]
    once, twice = (count_training_macs(each, img_size=16) for each in shapes)
    assert once < twice <= once + count_macs(shapes[0], img_size=16)


def test_a_model_that_can_not_be_checkpointed_is_named() -> None:
    model = load_recipe("gcp.isqrt_vgg16").model
    with pytest.raises(
        ValueError, match=r"grad_checkpointing: expected .* isqrt_vgg16"
    ):
        shapes_of(model, num_classes=3, grad_checkpointing=True)


STEP = StepMemory(kept=5000, peak=6000)


@pytest.mark.parametrize(
    ("optim", "num_moments"),
    [
        ({"optimizer": "adamw"}, 2),
        ({"optimizer": "sgd"}, 1),
        ({"optimizer": "sgd", "momentum": 0.0}, 0),
    ],
)
def test_memory_is_the_sum_of_its_parts(
    optim: dict[str, Any], num_moments: int
) -> None:
    run = step_run(ema_decay=0.9, **optim)
    state = state_of(run)
    parameters = count_parameters(state.model)
    found = estimate_memory(run, parameters=parameters, step=STEP)
    real = sum(t.nbytes for t in state.model.state_dict().values())
    assert found.weights == found.average == real
    assert found.optimizer == num_moments * found.gradients
    assert found.batches == 7 * 12 * 3 * 32 * 32 * 4
    assert (found.activations, found.passing) == (5000, 1000)
    assert found.total == sum(dataclasses.astuple(found))
    wanted = 2 * real + num_moments * parameters.num_trained_bytes
    assert checkpoint_bytes(run, parameters=parameters) == wanted


def test_a_gpu_holds_more_than_tensors() -> None:
    """What PyTorch's allocator does not know of; none of it on a CPU."""
    run = step_run()
    parameters = count_parameters(shapes_of(SO_VIT, num_classes=3))

    def found(**changes: Any) -> Memory:
        wanted = dataclasses.replace(run, **changes)
        return estimate_memory(wanted, parameters=parameters, step=STEP)

    on_cpu, one = found(), found(scale=Scale(use_gpu=True))
    assert on_cpu.context == on_cpu.nccl == on_cpu.dali == 0
    assert one.total - on_cpu.total == one.context + one.dali
    # Two batches of 12 images of 64x64 and as much again, of bytes, and a thread.
    decoded = dataclasses.replace(run.data, decoder="dali")
    with_dali = found(scale=Scale(use_gpu=True), data=decoded)
    assert one.dali == 0
    assert with_dali.dali == 2 * 12 * 3 * (64 * 64 + 64 * 64) + 2**24
    two = found(scale=Scale(use_gpu=True, num_workers=2), data=decoded)
    assert two.nccl > 0
    assert two.dali < with_dali.dali
    elsewhere = dataclasses.replace(decoded, decode_on="readers")
    assert found(scale=Scale(use_gpu=True), data=elsewhere).dali == 0


def test_sharding_leaves_a_worker_its_part() -> None:
    run = step_run(ema_decay=0.9)
    parameters = count_parameters(shapes_of(SO_VIT, num_classes=3))
    shared = dataclasses.replace(run, scale=Scale(num_workers=2, sharding="fsdp"))
    whole, part = (
        estimate_memory(each, parameters=parameters, step=STEP)
        for each in (run, shared)
    )
    assert part.weights == parameters.num_bytes // 2 + parameters.num_buffer_bytes
    assert part.average == part.weights
    assert part.optimizer == whole.optimizer // 2
    assert part.activations == whole.activations
