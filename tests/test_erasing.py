"""Erased boxes follow timm's rules, and what they hold the sample alone."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from timm.data.random_erasing import RandomErasing

from pipelines.ingest.erasing import Boxes, erase, erase_boxes

NUM, SIZE = 6000, 224


def draw(ids: np.ndarray, *, prob: float = 0.25, count: int = 1, **keys: int) -> Boxes:
    given: dict[str, Any] = {"img_size": SIZE, "seed": 0, "epoch": 0}
    return erase_boxes(ids, prob=prob, count=count, **(given | keys))


def timms_boxes(*, count: int, num: int) -> np.ndarray:
    """Erase with timm and look where: (num, 4) top, left, height, width; one each."""
    random.seed(5)
    erasing = RandomErasing(
        probability=1.0, mode="const", max_count=count, device="cpu"
    )
    boxes = []
    for _ in range(num):
        image = torch.ones(1, SIZE, SIZE)
        erasing(image)
        rows, columns = np.nonzero(image[0].numpy() == 0)
        top, left = rows.min(), columns.min()
        boxes.append((top, left, rows.max() + 1 - top, columns.max() + 1 - left))
    return np.array(boxes)


def test_boxes_are_distributed_as_timms() -> None:
    found = draw(np.arange(NUM), prob=1.0)
    assert (found.heights > 0).mean() > 0.999
    ours = {
        "area": found.heights[:, 0] * found.widths[:, 0],
        "aspect": np.log(found.heights[:, 0] / found.widths[:, 0]),
        "top": found.tops[:, 0] / (SIZE - found.heights[:, 0]),
        "left": found.lefts[:, 0] / (SIZE - found.widths[:, 0]),
    }
    top, left, height, width = timms_boxes(count=1, num=2000).T
    theirs = {
        "area": height * width,
        "aspect": np.log(height / width),
        "top": top / (SIZE - height),
        "left": left / (SIZE - width),
    }
    bound = 2.23 * math.sqrt(1 / NUM + 1 / 2000)
    for name, values in ours.items():
        grid = np.linspace(min(values), max(values), 200)
        cdfs = [
            np.searchsorted(np.sort(each), grid, side="right") / len(each)
            for each in (values, theirs[name])
        ]
        assert np.abs(cdfs[0] - cdfs[1]).max() < bound, name


@pytest.mark.parametrize("prob", [0.0, 0.25, 1.0])
def test_images_are_chosen_at_their_rate(prob: float) -> None:
    share = (draw(np.arange(NUM), prob=prob).heights > 0).mean()
    assert abs(share - prob) < 5 * math.sqrt(max(prob * (1 - prob), 1e-5) / NUM)


def test_several_boxes_share_out_the_area() -> None:
    found = draw(np.arange(NUM), prob=1.0, count=3)
    num_boxes = (found.heights > 0).sum(axis=1)
    assert np.abs(np.bincount(num_boxes)[1:] - NUM / 3).max() < 5 * math.sqrt(NUM / 3)
    areas = (found.heights * found.widths).sum(axis=1)
    assert areas.max() < 0.35 * SIZE**2
    assert (found.tops + found.heights <= SIZE).all()
    assert (found.lefts + found.widths <= SIZE).all()
    assert min(found.tops.min(), found.lefts.min()) >= 0


@pytest.mark.parametrize("mode", ["const", "rand", "pixel"])
def test_only_the_boxes_are_changed_and_as_the_mode_says(mode: Any) -> None:
    boxes = draw(np.arange(8), prob=1.0, img_size=32)
    images = torch.full((8, 3, 32, 32), 9.0).to(memory_format=torch.channels_last)
    found = erase(images, boxes, mode=mode)
    assert found.data_ptr() == images.data_ptr()
    for at in range(8):
        top, left = int(boxes.tops[at, 0]), int(boxes.lefts[at, 0])
        bottom, right = top + int(boxes.heights[at, 0]), left + int(boxes.widths[at, 0])
        box = found[at, :, top:bottom, left:right].clone()
        found[at, :, top:bottom, left:right] = 9.0
        assert (found[at] == 9.0).all()
        assert (box != 9.0).all()
        num_values = {"const": 1, "rand": 3, "pixel": box.numel()}[mode]
        assert len(box.unique()) >= 0.99 * num_values
        assert (mode == "const") == bool((box == 0).all())


def test_noise_is_standard_normal() -> None:
    boxes = draw(np.arange(64), prob=1.0)
    images = erase(torch.full((64, 3, SIZE, SIZE), 99.0), boxes, mode="pixel")
    noise = images[images != 99.0]
    assert abs(float(noise.mean())) < 5 / math.sqrt(len(noise))
    assert float(noise.std()) == pytest.approx(1, abs=0.01)


def test_a_sample_is_erased_the_same_in_any_company() -> None:
    ids = np.array([7, 2**40, 3, 12, 5])
    images = torch.randn(5, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    boxes = draw(ids, prob=0.9, count=2, img_size=64)
    whole = erase(images.clone(), boxes, mode="pixel")
    for at in (4, 0, 2):
        alone = draw(ids[at : at + 1], prob=0.9, count=2, img_size=64)
        found = erase(images[at : at + 1].clone(), alone, mode="pixel")
        assert torch.equal(found[0], whole[at])
    other = draw(ids, prob=0.9, count=2, img_size=64, epoch=1)
    assert not np.array_equal(other.tops, boxes.tops)
