"""The same numbers give timm's and torchvision's pixels, bit for bit."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import auto_augment as timm_ops
from torchvision.transforms import ColorJitter

from benchmarks.photographs import cut_photographs
from pipelines.config import parse_rand_augment
from pipelines.transforms.color_ops import Op, Ops, color_jitter, rand_augment
from pipelines.transforms.pillow_ops import apply_ops

FILL = (124, 116, 104)
# What Pillow 13 refuses to do, and timm with it.
NO_BITS = ((Op.POSTERIZE, 0.0), (Op.POSTERIZE, -2.0))


def apply_row(pixels: np.ndarray, ops: Ops, at: int) -> np.ndarray:
    return apply_ops(
        pixels,
        ids=ops.ids[at],
        args=ops.args[at],
        bicubic=ops.bicubic[at],
        fill=FILL,
    )


def apply_one(pixels: np.ndarray, op: Op, arg: float) -> np.ndarray:
    one = Ops(
        ids=np.array([[op]]), args=np.array([[arg]]), bicubic=np.zeros((1, 1), bool)
    )
    return apply_row(pixels, one, 0)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> list[np.ndarray]:
    folder: Path = tmp_path_factory.mktemp("photographs")
    paths = cut_photographs(folder, num_images=20, seed=4)
    images = [Image.open(path).resize((112, 96)) for path in paths]
    return [np.array(image) for image in images]


def timms_pixels(
    pixels: np.ndarray, op: int, arg: float, *, text: str, bicubic: bool
) -> np.ndarray:
    """Let timm's own transform draw the sign that `arg` has, and apply it."""
    kinds = Image.Resampling
    settings: dict[str, Any] = {
        "img_mean": FILL,
        "interpolation": kinds.BICUBIC if bicubic else kinds.BILINEAR,
    }
    augment = timm_ops.rand_augment_transform(text, settings).ops[op - 1]
    # Factors of increasing sets are 1 give or take.
    is_factor = augment.name.startswith(("Color", "Contrast", "Bright", "Sharp"))
    is_negative = arg < (1 if is_factor else 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(random, "random", lambda: 0.8 if is_negative else 0.2)
        return np.asarray(augment(Image.fromarray(pixels)))


@pytest.mark.parametrize("bicubic", [False, True])
@pytest.mark.parametrize(
    "text",
    ["rand-m9-inc1-p1", "rand-m9-p1", "rand-m3-inc1-p1", "rand-m14-mmax20-p1"],
)
def test_an_operations_pixels_are_timms(
    photographs: list[np.ndarray], text: str, bicubic: bool
) -> None:
    ops = rand_augment(
        np.arange(600),
        policy=parse_rand_augment(f"{text}-n1"),
        seed=0,
        epoch=0,
        interpolation="bicubic" if bicubic else "bilinear",
    )
    seen = set()
    for at, pair in enumerate(zip(ops.ids[:, 0], ops.args[:, 0], strict=True)):
        if pair in seen or pair in NO_BITS:
            continue
        seen.add(pair)
        pixels = photographs[at % len(photographs)]
        wanted = timms_pixels(pixels, *pair, text=text, bicubic=bicubic)
        assert np.array_equal(apply_row(pixels, ops, at), wanted), pair
    assert len(seen) >= 20


def test_jitters_pixels_are_torchvisions(
    photographs: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    ops = color_jitter(np.arange(60), strength=0.6, seed=0, epoch=0)
    jitter = ColorJitter(0.6, 0.6, 0.6)
    names = [Op.BRIGHTNESS, Op.CONTRAST, Op.COLOR]
    for at in range(60):
        order = [names.index(op) for op in ops.ids[at].tolist()]
        factors = [ops.args[at, order.index(which)] for which in range(3)]
        params = (torch.tensor(order), *factors, None)
        monkeypatch.setattr(jitter, "get_params", lambda *_, params=params: params)
        pixels = photographs[at % len(photographs)]
        wanted = np.asarray(jitter(Image.fromarray(pixels)))
        assert np.array_equal(apply_row(pixels, ops, at), wanted)


def test_operations_come_one_after_another(photographs: list[np.ndarray]) -> None:
    ops = rand_augment(
        np.arange(40),
        policy=parse_rand_augment("rand-m6-n3-mstd1"),
        seed=0,
        epoch=0,
        interpolation="random",
    )
    for at, pixels in enumerate(photographs * 2):
        wanted = pixels
        for column in range(3):
            one = {name: value[:, [column]] for name, value in vars(ops).items()}
            wanted = apply_row(wanted, Ops(**one), at)
        assert np.array_equal(apply_row(pixels, ops, at), wanted)


def test_nothing_to_do_gives_the_pixels_themselves(
    photographs: list[np.ndarray],
) -> None:
    assert apply_one(photographs[0], Op.IDENTITY, 0.0) is photographs[0]


@pytest.mark.parametrize("pair", NO_BITS)
def test_no_bits_are_black(
    photographs: list[np.ndarray], pair: tuple[Op, float]
) -> None:
    assert not apply_one(photographs[0], *pair).any()
    one_bit = apply_one(photographs[0], Op.POSTERIZE, 1.0)
    assert np.array_equal(one_bit, photographs[0] & 128)


def test_pixels_may_lie_in_any_way(photographs: list[np.ndarray]) -> None:
    whole = photographs[0]
    views = [whole[:, ::-1], whole[7:50, 3:90], np.asfortranarray(whole)]
    for view in views:
        before = view.copy()
        for op, arg in ((Op.ROTATE, 12.0), (Op.SHARPNESS, 0.2), (Op.INVERT, 0.0)):
            found = apply_one(view, op, arg)
            assert np.array_equal(found, apply_one(np.ascontiguousarray(view), op, arg))
        assert np.array_equal(view, before)


def test_what_is_moved_away_shows_the_fill(photographs: list[np.ndarray]) -> None:
    found = apply_one(photographs[0], Op.TRANSLATE_X, 0.25)
    assert (found[:, -27:] == FILL).all()
    assert np.array_equal(found[:, :84], photographs[0][:, 28:])


def test_augmented_photographs_have_timms_statistics(
    photographs: list[np.ndarray],
) -> None:
    # Not m9: on Pillow 13 timm ends with an error where it draws magnitude 10.
    text, num = "rand-m7-mstd0.5-inc1", 1200
    settings = {"img_mean": FILL, "interpolation": Image.Resampling.BICUBIC}
    transform = timm_ops.rand_augment_transform(text, settings)
    random.seed(1)
    np.random.seed(1)
    ops = rand_augment(
        np.arange(num),
        policy=parse_rand_augment(text),
        seed=0,
        epoch=0,
        interpolation="bicubic",
    )
    figures: list[list[np.ndarray]] = [[], []]
    for at in range(num):
        pixels = photographs[at % len(photographs)]
        theirs = np.asarray(transform(Image.fromarray(pixels)))
        for which, found in enumerate((apply_row(pixels, ops, at), theirs)):
            levels = found.reshape(-1, 3)
            spread = np.concatenate([levels.mean(axis=0), levels.std(axis=0)])
            figures[which].append(spread)
    ours, timms = (np.array(rows) for rows in figures)
    # Of an image's mean and deviation, by channel: their mean over images, within four
    # and a half standard errors.
    error = np.sqrt((ours.var(axis=0) + timms.var(axis=0)) / num)
    assert (np.abs(ours.mean(axis=0) - timms.mean(axis=0)) < 4.5 * error).all()
