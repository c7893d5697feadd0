"""The papers' networks have the sizes of the papers' tables."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import sovit
from pipelines.training.model import count_macs
from sovit.attention import stages_of
from tests.paper_networks import ECA_KERNELS, ECA_MEBI, MILLIONS, on_meta, usual


def num_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def num_macs(model: nn.Module) -> int:
    """Count multiply-adds of one image at 224x224."""
    return count_macs(model, img_size=224)


@pytest.mark.parametrize("name", MILLIONS)
def test_number_of_parameters_is_the_table_s(name: str) -> None:
    assert round(num_parameters(usual(name)) / 1e6, 2) == MILLIONS[name]


@pytest.mark.parametrize("name", ECA_MEBI)
def test_number_of_parameters_is_the_eca_table_s(name: str) -> None:
    places = len(str(ECA_MEBI[name]).partition(".")[2])
    assert round(num_parameters(usual(name)) / 2**20, places) == ECA_MEBI[name]


def test_eca_adds_eighty_parameters_to_resnet50() -> None:
    added = num_parameters(usual("eca_resnet50")) - num_parameters(on_meta("resnet50"))
    assert added == 80


def test_the_released_vgg_file_is_as_large() -> None:
    state = usual("isqrt_vgg16").state_dict().values()
    assert round(sum(t.numel() * t.element_size() for t in state) / 2**20, 1) == 650.4


@pytest.mark.parametrize(
    ("depth", "plain", "dims"),
    [
        (18, 3.05, {64: 3.06, 128: 3.10, 256: 3.32}),
        (34, 5.59, {256: 5.86}),
        (50, 6.21, {64: 6.24, 128: 6.29, 256: 6.56}),
        (101, 9.92, {256: 10.27}),
    ],
)
def test_multiply_adds_are_the_table_s(
    depth: int, plain: float, dims: dict[int, float]
) -> None:
    """Hold the networks against 10^9 counts whose root takes twelve full products."""
    with torch.device("meta"):
        model = sovit.second_order(f"resnet{depth}", pooling="avg")
    assert num_macs(model) / 1e9 == pytest.approx(plain, abs=0.01)
    for dim, wanted in dims.items():
        name = f"isqrt_resnet{depth}" + ("" if dim == 256 else f"_{dim}")
        model = on_meta(name, pooling={"normalizer": "none"})
        root = 12 * dim**3
        assert (num_macs(model) + root) / 1e9 == pytest.approx(wanted, abs=0.015)


@pytest.mark.parametrize(
    ("name", "printed"),
    [
        ("deit_tiny_so", 2.3),
        ("deit_base_so", 18.2),
        ("swin_tiny_so", 6.0),
        ("swin_base_so", 16.9),
    ],
)
def test_multiply_adds_are_near_the_printed_ones(name: str, printed: float) -> None:
    assert num_macs(usual(name)) / 1e9 == pytest.approx(printed, rel=0.04)


@pytest.mark.parametrize("name", ECA_KERNELS)
def test_eca_has_the_released_kernels_in_every_block(name: str) -> None:
    model = usual(name)
    for stage, kernel in zip(stages_of(model), ECA_KERNELS[name], strict=True):
        blocks = [block.get_parameter("se.conv.weight") for block in stage]
        assert {weight.shape for weight in blocks} == {(1, 1, kernel)}
