"""Windows: torchvision's statistics, timm's evaluation, and draws that are data."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from timm.data.transforms_factory import create_transform
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms import functional as tv

from benchmarks.photographs import cut_photographs
from pipelines.config import Data
from pipelines.transforms.crops import Geometry, center_crop, random_resized_crop
from pipelines.transforms.decoder import decode_eval

SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
NUM_DRAWS = 20_000


def draw(
    ids: np.ndarray,
    *,
    height: int | np.ndarray = 375,
    width: int | np.ndarray = 500,
    seed: int = 0,
    epoch: int = 0,
    scale: tuple[float, float] = SCALE,
    ratio: tuple[float, float] = RATIO,
    hflip: float = 0.5,
    interpolation: Literal["bilinear", "bicubic", "random"] = "random",
) -> Geometry:
    return random_resized_crop(
        ids,
        heights=np.broadcast_to(np.asarray(height), ids.shape).astype(np.int64),
        widths=np.broadcast_to(np.asarray(width), ids.shape).astype(np.int64),
        seed=seed,
        epoch=epoch,
        img_size=224,
        scale=scale,
        ratio=ratio,
        hflip=hflip,
        interpolation=interpolation,
    )


@given(
    height=st.integers(1, 4000),
    width=st.integers(1, 4000),
    low=st.floats(0.01, 1),
    ratio=st.floats(0.2, 1),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=100)
def test_windows_lie_inside_their_images(
    height: int, width: int, low: float, ratio: float, seed: int
) -> None:
    found = draw(
        np.arange(20),
        height=height,
        width=width,
        seed=seed,
        scale=(low, 1.0),
        ratio=(ratio, 1 / ratio),
    )
    assert (found.window >= 1).all()
    assert (found.start >= 0).all()
    assert (found.start + found.window <= [height, width]).all()
    assert (found.resized == 224).all()
    assert (found.crop == 0).all()


@pytest.mark.parametrize("size", [(375, 500), (500, 375), (28, 28), (100, 400)])
def test_windows_are_distributed_as_torchvisions(size: tuple[int, int]) -> None:
    height, width = size
    found = draw(np.arange(NUM_DRAWS), height=height, width=width)
    ours = np.concatenate([found.start, found.window], axis=1)
    torch.manual_seed(0)
    image = torch.empty(1, height, width)
    theirs = np.array(
        [
            RandomResizedCrop.get_params(image, list(SCALE), list(RATIO))
            for _ in range(NUM_DRAWS // 4)
        ]
    )
    values = []
    for top, left, window_h, window_w in (ours.T, theirs.T):
        values.append(
            [
                window_h * window_w / (height * width),
                np.log(window_w / window_h),
                (top + window_h / 2) / height,
                (left + window_w / 2) / width,
            ]
        )
    for one, other in zip(*values, strict=True):
        # Kolmogorov and Smirnov's distance; 2.2 over the root of the harmonic sample
        # size is passed by chance in one of 8,000 such comparisons.
        steps = np.sort(np.concatenate([one, other]))
        shares = [
            np.searchsorted(np.sort(v), steps, side="right") / len(v)
            for v in (one, other)
        ]
        bound = 2.2 / math.sqrt(1 / (1 / len(one) + 1 / len(other)))
        assert np.abs(shares[0] - shares[1]).max() < bound
        # Means within four standard errors.
        error = math.sqrt(one.var() / len(one) + other.var() / len(other))
        assert abs(one.mean() - other.mean()) < 4 * error + 1e-9


@pytest.mark.parametrize("hflip", [0.0, 0.3, 1.0])
def test_flips_come_at_their_rate(hflip: float) -> None:
    flips = draw(np.arange(NUM_DRAWS), hflip=hflip).flip
    deviation = math.sqrt(hflip * (1 - hflip) / NUM_DRAWS)
    assert abs(flips.mean() - hflip) <= 4 * deviation


def test_draws_depend_on_seed_epoch_and_id_alone() -> None:
    ids = np.arange(300)
    sizes = np.random.default_rng(0).integers(20, 600, (300, 2))
    whole = draw(ids, height=sizes[:, 0], width=sizes[:, 1], seed=4, epoch=2)
    order = np.random.default_rng(1).permutation(300)
    for part in np.array_split(order, 7):
        heights, widths = sizes[part].T
        found = draw(ids[part], height=heights, width=widths, seed=4, epoch=2)
        for name, value in vars(found).items():
            assert np.array_equal(value, getattr(whole, name)[part])
    for seed, epoch in ((5, 2), (4, 3)):
        heights, widths = sizes.T
        found = draw(ids, height=heights, width=widths, seed=seed, epoch=epoch)
        assert (found.window != whole.window).any(axis=1).mean() > 0.9
        assert 0.3 < (found.flip != whole.flip).mean() < 0.7


@pytest.mark.parametrize("size", [(20, 3000), (3000, 20), (1, 50), (50, 1)])
def test_an_image_that_no_try_fits_gives_torchvisions_window(
    size: tuple[int, int],
) -> None:
    height, width = size
    found = draw(np.arange(50), height=height, width=width, scale=(0.5, 1.0))
    image = torch.empty(1, height, width)
    wanted = RandomResizedCrop.get_params(image, [0.5, 1.0], list(RATIO))
    places = np.concatenate([found.start, found.window], axis=1)
    assert {tuple(place) for place in places.tolist()} == {wanted}


SIDES = [1, 2, 15, 28, 223, 224, 225, 255, 256, 257, 333, 375, 500, 1001]


@pytest.mark.parametrize(
    ("img_size", "crop_pct"), [(224, 0.875), (224, 1.0), (32, 1.0), (225, 0.9)]
)
def test_center_crops_are_torchvisions(img_size: int, crop_pct: float) -> None:
    sizes = np.array([(height, width) for height in SIDES for width in SIDES])
    found = center_crop(
        heights=sizes[:, 0],
        widths=sizes[:, 1],
        img_size=img_size,
        crop_pct=crop_pct,
        interpolation="bicubic",
    )
    short = math.floor(img_size / crop_pct)
    assert np.array_equal(found.window, sizes)
    assert not found.start.any()
    assert not found.flip.any()
    for at, (height, width) in enumerate(sizes.tolist()):
        wanted = tv._compute_resized_output_size((height, width), [short])
        assert found.resized[at].tolist() == wanted
        corners = [round((side - img_size) / 2) for side in wanted]
        assert found.crop[at].tolist() == corners


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("photographs")
    return cut_photographs(folder, num_images=12, seed=2)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("crop_pct", [0.875, 0.95, 1.0])
def test_evaluation_is_timms_pixel_for_pixel(
    photographs: list[Path], interpolation, crop_pct: float
) -> None:
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
    transform = create_transform(
        224,
        is_training=False,
        interpolation=interpolation,
        crop_pct=crop_pct,
        mean=mean,
        std=std,
    )
    images = [Image.open(path).convert("RGB") for path in photographs]
    wanted = torch.stack([transform(image) for image in images])  # pyright: ignore
    data = Data(
        train="t",
        val="v",
        batch_size=8,
        mean=mean,
        std=std,
        crop_pct=crop_pct,
        eval_interpolation=interpolation,
    )
    encoded = [path.read_bytes() for path in photographs]
    found = decode_eval(encoded, data=data, img_size=224)
    # torch's resize and Pillow's work in fixed point of other widths.
    std_levels = torch.tensor(std).view(1, 3, 1, 1) * 255
    levels = (found - wanted).abs() * std_levels
    assert levels.max() < 1.001
    assert levels.mean() < 0.1


def test_a_coin_for_each_image_chooses_the_interpolation() -> None:
    ids = np.arange(NUM_DRAWS)
    tossed = draw(ids).bicubic
    assert abs(tossed.mean() - 0.5) < 4 * math.sqrt(0.25 / NUM_DRAWS)
    assert np.array_equal(draw(ids[::-1]).bicubic, tossed[::-1])
    assert not np.array_equal(draw(ids, epoch=1).bicubic, tossed)
    assert draw(ids, interpolation="bicubic").bicubic.all()
    assert not draw(ids, interpolation="bilinear").bicubic.any()
