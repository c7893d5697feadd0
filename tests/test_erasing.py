"""Erased boxes: timm's statistics, and noise that belongs to the sample."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.data.random_erasing import RandomErasing
from torch import Tensor

from pipelines.transforms.erasing import Boxes, erase, erase_boxes

NUM_DRAWS = 6000
SIZE = 48


def draw(ids: np.ndarray, **changes: Any) -> Boxes:
    given: dict[str, Any] = {"prob": 0.25, "count": 1, "img_size": SIZE}
    return erase_boxes(ids, **{**given, "seed": 0, "epoch": 0, **changes})


def take(boxes: Boxes, places: Any) -> Boxes:
    return Boxes(**{name: value[places] for name, value in vars(boxes).items()})


def timms_boxes(*, prob: float) -> np.ndarray:
    """Give top, left, height and width of what timm erased, from what it changed."""
    random.seed(2)
    torch.manual_seed(2)
    transform = RandomErasing(prob, mode="pixel", device="cpu")
    found = []
    for _ in range(NUM_DRAWS):
        changed = transform(torch.zeros(1, SIZE, SIZE))[0] != 0
        if changed.any():
            rows, columns = (changed.any(dim=d).nonzero()[:, 0] for d in (1, 0))
            top, left = int(rows[0]), int(columns[0])
            found.append(
                (top, left, int(rows[-1]) + 1 - top, int(columns[-1]) + 1 - left)
            )
    return np.array(found)


def assert_alike(one: np.ndarray, other: np.ndarray) -> None:
    """Hold Kolmogorov and Smirnov's distance: 2.2 errs once in 8,000 comparisons."""
    one, other = np.sort(one), np.sort(other)
    steps = np.concatenate([one, other])
    shares = [np.searchsorted(v, steps, side="right") / len(v) for v in (one, other)]
    bound = 2.2 / math.sqrt(1 / (1 / len(one) + 1 / len(other)))
    assert np.abs(shares[0] - shares[1]).max() < bound


@pytest.mark.parametrize("prob", [0.25, 1.0])
def test_boxes_are_distributed_as_timms(prob: float) -> None:
    theirs = timms_boxes(prob=prob)
    boxes = draw(np.arange(NUM_DRAWS), prob=prob)
    places = (boxes.tops, boxes.lefts, boxes.heights, boxes.widths)
    ours = np.concatenate(places, axis=1)
    ours = ours[ours[:, 2] > 0]
    assert (
        abs(len(ours) / NUM_DRAWS - prob)
        <= 4.5 * math.sqrt(prob * (1 - prob) / NUM_DRAWS) + 1 / NUM_DRAWS
    )
    for values in (
        lambda boxes: boxes[:, 2] * boxes[:, 3],
        lambda boxes: boxes[:, 2] / boxes[:, 3],
        lambda boxes: boxes[:, 0] / (SIZE - boxes[:, 2]),
        lambda boxes: boxes[:, 1] / (SIZE - boxes[:, 3]),
    ):
        assert_alike(values(ours), values(theirs))


def test_boxes_reach_timms_limits() -> None:
    boxes = draw(np.arange(20_000), prob=1.0, img_size=2000)
    there = boxes.heights > 0
    heights, widths = boxes.heights[there], boxes.widths[there]
    areas, aspects = heights * widths / 2000**2, heights / widths
    for values, low, high in ((areas, 0.02, 1 / 3), (aspects, 0.3, 1 / 0.3)):
        assert low * 0.99 < values.min() < low * 1.02
        assert high * 0.98 < values.max() < high * 1.01


@pytest.mark.parametrize("count", [1, 3])
def test_erased_shares_are_timms(count: int) -> None:
    random.seed(4)
    transform = RandomErasing(0.5, mode="const", max_count=count, device="cpu")
    theirs = 1 - transform(torch.ones(NUM_DRAWS // 2, 1, SIZE, SIZE))
    boxes = draw(np.arange(NUM_DRAWS // 2), prob=0.5, count=count)
    ours = 1 - erase(torch.ones_like(theirs), boxes, mode="const")
    assert_alike(*(erased.mean(dim=(1, 2, 3)).numpy() for erased in (ours, theirs)))
    # Where in the image, on the whole.
    maps = [erased.mean(dim=(0, 1)) for erased in (ours, theirs)]
    assert (maps[0] - maps[1]).abs().max() < 0.05
    num_boxes = (boxes.heights > 0).sum(axis=1)
    for number in range(1, count + 1):
        assert abs((num_boxes == number).mean() - 0.5 / count) < 0.04


@given(
    img_size=st.integers(1, 300),
    count=st.integers(1, 4),
    seed=st.integers(0, 2**40),
)
@settings(max_examples=100)
def test_boxes_lie_inside_their_images(img_size: int, count: int, seed: int) -> None:
    boxes = draw(np.arange(30), prob=0.9, count=count, img_size=img_size, seed=seed)
    for start, length in ((boxes.tops, boxes.heights), (boxes.lefts, boxes.widths)):
        assert start.shape == (30, count)
        assert start.dtype == length.dtype == np.int64
        assert (start >= 0).all()
        assert (start + length <= img_size).all()
        assert (length < img_size).all()


@given(
    seed=st.integers(0, 2**40),
    ids=st.lists(st.integers(0, 2**40), min_size=2, max_size=8, unique=True),
    mode=st.sampled_from(["const", "rand", "pixel"]),
    order=st.randoms(),
)
@settings(max_examples=40)
def test_a_samples_boxes_and_noise_are_its_own(
    seed: int, ids: list[int], mode: Any, order: random.Random
) -> None:
    given: dict[str, Any] = {"prob": 0.8, "count": 2, "seed": seed}
    all_ids = np.array(ids)
    whole = draw(all_ids, **given)
    erased = erase(images_of(ids), whole, mode=mode)
    places = list(range(len(ids)))
    order.shuffle(places)
    for part in (places[: len(ids) // 2], places[len(ids) // 2 :]):
        boxes = draw(all_ids[part], **given)
        for name, value in vars(boxes).items():
            assert np.array_equal(value, getattr(whole, name)[part])
        found = erase(images_of([ids[at] for at in part]), boxes, mode=mode)
        assert torch.equal(found, erased[part])


def images_of(ids: list[int]) -> Tensor:
    levels = torch.tensor(ids).remainder(97).float() + 100
    return levels.view(-1, 1, 1, 1).expand(-1, 3, SIZE, SIZE).clone()


def test_other_seeds_and_epochs_erase_otherwise() -> None:
    ids = np.arange(200)
    one = draw(ids, prob=1.0)
    for changes in ({"seed": 1}, {"epoch": 1}):
        other = draw(ids, prob=1.0, **changes)
        assert (one.tops != other.tops).mean() > 0.8
        assert (one.noise_keys != other.noise_keys).all()
    assert len(np.unique(one.noise_keys)) == 200


@pytest.mark.parametrize("mode", ["const", "rand", "pixel"])
def test_memory_layout_changes_nothing(mode: Any) -> None:
    boxes = draw(np.arange(64), prob=1.0, count=2)
    images = torch.randn(64, 3, SIZE, SIZE)
    last = images.to(memory_format=torch.channels_last, copy=True)
    plain = images.clone()
    assert erase(plain, boxes, mode=mode) is plain
    assert torch.equal(erase(last, boxes, mode=mode), plain)
    assert last.is_contiguous(memory_format=torch.channels_last)


def test_only_boxes_change_and_modes_are_timms() -> None:
    boxes = draw(np.arange(300), prob=0.5)
    before = torch.full((300, 3, SIZE, SIZE), 50.0)
    found = {
        m: erase(before.clone(), boxes, mode=m) for m in ("const", "rand", "pixel")
    }
    patches: dict[str, list[Tensor]] = {mode: [] for mode in found}
    for at in range(300):
        top, left, height, width = (
            int(values[at, 0])
            for values in (boxes.tops, boxes.lefts, boxes.heights, boxes.widths)
        )
        for mode, images in found.items():
            box = images[at, :, top : top + height, left : left + width]
            patches[mode].append(box.flatten(1).clone())
            box.fill_(50)
    assert all(torch.equal(images, before) for images in found.values())
    assert not torch.cat(patches["const"], dim=1).any()
    colors = torch.stack([patch[:, 0] for patch in patches["rand"] if patch.numel()])
    for patch in patches["rand"]:
        assert (patch == patch[:, :1]).all()
    values = torch.cat(patches["pixel"], dim=1)
    for normal in (colors.flatten(), values.flatten()):
        num = len(normal)
        assert abs(normal.mean()) < 4.5 / math.sqrt(num)
        assert abs(normal.std() - 1) < 4.5 / math.sqrt(2 * num)
    # Channels are independent, and neighbours.
    assert torch.corrcoef(values).fill_diagonal_(0).abs().max() < 0.02
    assert len(values.unique()) > 0.99 * values.numel()


def test_torchs_own_random_state_is_left_alone() -> None:
    before = torch.get_rng_state()
    erase(torch.zeros(64, 3, SIZE, SIZE), draw(np.arange(64)), mode="pixel")
    assert torch.equal(torch.get_rng_state(), before)


def test_nothing_is_erased_at_no_probability() -> None:
    boxes = draw(np.arange(100), prob=0.0, count=3)
    assert not boxes.heights.any()
    assert not boxes.widths.any()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("mode", ["const", "rand", "pixel"])
def test_a_gpu_erases_the_same_boxes(mode: Any) -> None:
    boxes = draw(np.arange(64), prob=0.7, count=2)
    images = torch.full((64, 3, SIZE, SIZE), 50.0)
    on_gpu = erase(images.cuda(), boxes, mode=mode).cpu()
    on_cpu = erase(images.clone(), boxes, mode=mode)
    assert torch.equal(on_gpu == 50, on_cpu == 50)
    some = take(boxes, [3, 1, 40])
    again = erase(images[:3].cuda(), some, mode=mode).cpu()
    assert torch.equal(again, on_gpu[[3, 1, 40]])
