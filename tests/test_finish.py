"""Images as the step takes them: the same numbers on a GPU's path, and in bfloat16."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

import sovit
from pipelines.config import Augment, Probe, Run, Scale
from pipelines.data.loader import image_dtype
from pipelines.training.step import mixed
from pipelines.transforms import normalize
from pipelines.transforms.erasing import erase_boxes
from pipelines.transforms.normalize import Finisher
from pipelines.transforms.sampling import Draws
from tests.small_runs import CPU, SO_VIT, settings_of, small_run, state_of
from tests.small_sets import jpeg
from tests.test_dali import draws_for
from tests.test_loop import batch_of, run_loop
from tests.test_salvage import SETTINGS

GPU, SIZE, NUM = torch.device("cuda", 0), 32, 6
BFLOAT16 = torch.bfloat16


def pixels_and_draws() -> tuple[Tensor, Draws]:
    generator = torch.Generator().manual_seed(0)
    shape = (NUM, SIZE, SIZE, 3)
    pixels = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
    boxes = erase_boxes(
        np.arange(NUM), prob=0.9, count=2, img_size=SIZE, seed=0, epoch=0
    )
    encoded = [jpeg(0, size=(SIZE, SIZE))] * NUM
    plain = draws_for(encoded, train=False, img_size=SIZE)
    return pixels, dataclasses.replace(plain, boxes=boxes)


@pytest.mark.parametrize("mode", ["const", "rand", "pixel"])
def test_a_gpus_images_are_the_cpus_and_bfloat16_is_these_rounded(
    mode: Literal["const", "rand", "pixel"], monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels, draws = pixels_and_draws()
    settings = dataclasses.replace(
        SETTINGS, img_size=SIZE, augment=Augment(re_prob=0.9, re_mode=mode)
    )
    found: dict[Any, Tensor] = {}
    for on_gpu in (False, True):
        # Its code, of other kernels.
        monkeypatch.setattr(normalize, "is_gpu", lambda device, on_gpu=on_gpu: on_gpu)
        for dtype in (torch.float32, BFLOAT16):
            finisher = Finisher(settings, device=CPU, num_threads=1, dtype=dtype)
            images = found[on_gpu, dtype] = finisher(pixels, boxes=draws.boxes).clone()
            assert images.dtype == dtype
            assert images.is_contiguous(memory_format=torch.channels_last)
    wanted = found[False, torch.float32]
    assert torch.equal(found[True, torch.float32], wanted)
    assert torch.equal(found[True, BFLOAT16], wanted.to(BFLOAT16))
    assert torch.equal(found[False, BFLOAT16], wanted.to(BFLOAT16))
    assert not torch.equal(wanted.to(BFLOAT16).float(), wanted)


RUN = dataclasses.replace(small_run("none", model=SO_VIT), scale=Scale())


@pytest.fixture
def _everything_has_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.hardware.device.has_bfloat16", lambda device: True)


@pytest.mark.usefixtures("_everything_has_bfloat16")
def test_images_are_bfloat16_where_a_gpus_first_layer_takes_them_as_they_are() -> None:
    def of(run: Run, *, train: bool = True, device: torch.device = GPU) -> torch.dtype:
        return image_dtype(run, train=train, device=device)

    mixup, cutmix = (
        dataclasses.replace(RUN, optim=dataclasses.replace(RUN.optim, **{name: 0.8}))
        for name in ("mixup", "cutmix")
    )
    assert of(RUN) == of(cutmix) == BFLOAT16
    float32 = [
        of(RUN, device=CPU),
        of(RUN, train=False),
        of(mixup),
        of(dataclasses.replace(RUN, scale=Scale(amp="off"))),
        of(dataclasses.replace(RUN, probe=Probe(every_steps=5))),
    ]
    assert float32 == [torch.float32] * 5


@pytest.mark.usefixtures("_everything_has_bfloat16")
def test_steps_on_bfloat16_images_are_those_on_float32_bit_for_bit() -> None:
    """Of autocast, on the CPU, which rounds as a GPU's does before the first layer."""
    cutmix = dataclasses.replace(RUN.optim, cutmix=1.0, label_smoothing=0.1)
    run = dataclasses.replace(RUN, optim=cutmix)
    images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    trained = []
    for dtype in (torch.float32, BFLOAT16):
        state = state_of(run)
        items = [
            batch_of(images.to(dtype), torch.arange(8) % 3, index=index)
            for index in range(2)
        ]
        mixes = [
            mixed(item, settings=settings_of(run, steps_per_epoch=9))[0]
            for item in items
        ]
        assert all(one.dtype == dtype for one in mixes)
        logs = run_loop(state, items, run=run)
        trained.append((logs, state.model.state_dict()))
    (logs, weights), (other_logs, others) = trained
    assert [log["loss"] for log in logs] == [log["loss"] for log in other_logs]
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[name], others[name]) for name in weights)


FAMILIES = [
    *("so_vit_7", "sot_tiny", "deit_tiny_so", "swin_tiny_so", "gsop_resnet50_1"),
    *("eca_resnet18", "mpncov_resnet50", "isqrt_resnet18", "isqrt_vgg16"),
    "isqrt_mobilenetv2",
]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_first_to_touch_an_image_is_a_layer_that_autocast_rounds_for(
    name: str,
) -> None:
    class FirstLayer(Exception):
        pass

    def seen(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if not list(module.children()):
            raise FirstLayer(module, inputs[0])

    assert sovit  # registers the networks
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=3)
        images = torch.empty(2, 3, 224, 224)
    for module in model.modules():
        module.register_forward_pre_hook(seen)
    with pytest.raises(FirstLayer) as caught:
        model(images)
    layer, given = caught.value.args
    assert isinstance(layer, nn.Conv2d | nn.Linear)
    assert given is images
