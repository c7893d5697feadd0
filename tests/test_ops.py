"""Operations drawn as numbers: timm's formulas, timm's statistics, free of order."""

from __future__ import annotations

import itertools
import math
import random
from collections import defaultdict
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from timm.data import auto_augment as timm_ops
from torchvision.transforms import ColorJitter

from pipelines.config import parse_rand_augment
from pipelines.transforms.color_ops import Op, Ops, color_jitter, rand_augment

NUM_DRAWS = 6000


def draw(ids: np.ndarray, text: str, **changes: Any) -> Ops:
    given: dict[str, Any] = {"seed": 0, "epoch": 0, "interpolation": "bicubic"}
    return rand_augment(ids, policy=parse_rand_augment(text), **{**given, **changes})


def timms_draws(text: str, *, num: int) -> list[list[tuple[Op, float, int]]]:
    """Let timm draw, and note operations, arguments and interpolations, not apply."""
    random.seed(3)
    np.random.seed(3)
    notes: list[tuple[Op, float, int]] = []

    def noting(op: Op) -> Any:
        def note(image: Any, *args: float, **kwargs: Any) -> Any:
            kind = timm_ops._interpolation(kwargs)
            notes.append((op, float(args[0]) if args else 0.0, int(kind)))
            return image

        return note

    transform = timm_ops.rand_augment_transform(text, {"img_mean": (1, 2, 3)})
    for at, augment in enumerate(transform.ops):
        augment.aug_fn = noting(Op(at + 1))
    found = []
    for _ in range(num):
        transform(Image.new("RGB", (1, 1)))
        found.append(notes.copy())
        notes.clear()
    return found


def assert_alike(one: np.ndarray, other: np.ndarray) -> None:
    """Hold Kolmogorov and Smirnov's distance: 2.2 errs once in 8,000 comparisons."""
    one, other = np.sort(one), np.sort(other)
    steps = np.concatenate([one, other])
    shares = [np.searchsorted(v, steps, side="right") / len(v) for v in (one, other)]
    bound = 2.2 / math.sqrt(1 / (1 / len(one) + 1 / len(other)))
    assert np.abs(shares[0] - shares[1]).max() < bound


def assert_share(found: Any, wanted: float) -> None:
    """Hold a share within four and a half of its standard errors."""
    error = math.sqrt(wanted * (1 - wanted) / found.size)
    assert abs(found.mean() - wanted) <= 4.5 * error


@pytest.mark.parametrize(
    "text",
    [
        "rand-m9-mstd0.5-inc1",
        "rand-m9-mstd0.5",
        "rand-m5-n3-mstd101-inc1-p0.8",
        "rand-m14-mmax20-mstd2",
    ],
)
def test_draws_are_distributed_as_timms(text: str) -> None:
    ours = draw(np.arange(NUM_DRAWS), text, interpolation="random")
    theirs = timms_draws(text, num=NUM_DRAWS)
    assert_alike((ours.ids > 0).sum(axis=1), np.array([len(x) for x in theirs]))
    args, cubic = defaultdict(list), []
    for op, arg, kind in itertools.chain.from_iterable(theirs):
        args[op].append(arg)
        cubic.append(kind == Image.Resampling.BICUBIC)
    assert_share(ours.bicubic[ours.ids > 0], 0.5)
    assert_share(np.array(cubic), 0.5)
    for op in list(Op)[1:]:
        found = ours.args[ours.ids == op]
        assert_share(ours.ids[ours.ids > 0] == op, 1 / 15)
        assert_alike(found, np.array(args[op]))
        error = math.hypot(found.std(), np.std(args[op])) / math.sqrt(len(found))
        assert abs(found.mean() - np.mean(args[op])) <= 4.5 * error + 1e-9


def test_magnitudes_are_normal_and_signs_fair() -> None:
    ops = draw(np.arange(30_000), "rand-m5-n4-mstd1-p1")
    ranges = {Op.ROTATE: 30, Op.SHEAR_X: 0.3, Op.SHEAR_Y: 0.3}
    ranges |= {Op.TRANSLATE_X: 0.45, Op.TRANSLATE_Y: 0.45}
    signed = np.concatenate(
        [ops.args[ops.ids == op] / most for op, most in ranges.items()]
    )
    assert_share(signed < 0, 0.5)
    normal = np.abs(signed) * 10 - 5
    assert abs(normal.mean()) < 4.5 / math.sqrt(len(normal))
    assert abs(normal.std() - 1) < 4.5 / math.sqrt(2 * len(normal))
    assert_share(normal < -1, 0.158655)
    assert abs(np.corrcoef(signed < 0, normal)[0, 1]) < 4.5 / math.sqrt(len(normal))


@given(magnitude=st.integers(0, 25), limit=st.integers(1, 25), increasing=st.booleans())
@settings(max_examples=40)
def test_arguments_are_timms_to_the_last_bit(
    magnitude: int, limit: int, increasing: bool
) -> None:
    text = f"rand-m{magnitude}-mmax{limit}-inc{int(increasing)}-p1"
    ours = draw(np.arange(400), text)
    transform = timm_ops.rand_augment_transform(text, {"img_mean": (1, 2, 3)})
    assert (ours.ids > 0).all()
    for at, augment in enumerate(transform.ops):
        found = set(ours.args[ours.ids == at + 1].tolist())
        assert found == both_arguments(augment, min(magnitude, limit))


def both_arguments(augment: timm_ops.AugmentOp, level: int) -> set[float]:
    """Ask timm for the arguments with either sign."""
    if augment.level_fn is None:
        return {0.0}
    found = set()
    with pytest.MonkeyPatch.context() as patch:
        for coin in (0.2, 0.8):
            patch.setattr(random, "random", lambda coin=coin: coin)
            found.add(float(augment.level_fn(float(level), {})[0]))
    return found


@given(
    seed=st.integers(0, 2**40),
    epoch=st.integers(0, 1000),
    ids=st.lists(st.integers(0, 2**40), min_size=2, max_size=20, unique=True),
    order=st.randoms(),
)
@settings(max_examples=50)
def test_draws_depend_on_seed_epoch_and_id_alone(
    seed: int, epoch: int, ids: list[int], order: random.Random
) -> None:
    given: dict[str, Any] = {"seed": seed, "epoch": epoch}
    places = list(range(len(ids)))
    order.shuffle(places)
    all_ids = np.array(ids)
    for function in (
        lambda ids: draw(ids, "rand-m9-n3-mstd0.5", interpolation="random", **given),
        lambda ids: color_jitter(ids, strength=0.4, **given),
    ):
        whole = function(all_ids)
        for part in (places[: len(ids) // 2], places[len(ids) // 2 :]):
            found = function(all_ids[part])
            for name, value in vars(found).items():
                assert np.array_equal(value, getattr(whole, name)[part])


def test_other_seeds_and_epochs_draw_anew() -> None:
    ids = np.arange(500)
    for changes in ({"seed": 1}, {"epoch": 1}):
        one, other = draw(ids, "rand-p1"), draw(ids, "rand-p1", **changes)
        assert_share(one.ids == other.ids, 1 / 15)
        given = {"seed": 0, "epoch": 0, **changes}
        found = color_jitter(ids, strength=0.5, **given)
        assert not np.isin(
            found.args, color_jitter(ids, strength=0.5, seed=0, epoch=0).args
        ).any()


def test_more_layers_leave_the_first_as_they_were() -> None:
    short, long = (draw(np.arange(100), f"rand-n{n}-mstd1") for n in (2, 5))
    for name, value in vars(short).items():
        assert np.array_equal(getattr(long, name)[:, :2], value)


def test_layers_are_independent() -> None:
    ops = draw(np.arange(NUM_DRAWS), "rand-m5-n2-mstd101")
    applied = ops.ids > 0
    assert_share(applied.all(axis=1), 0.25)
    both = ops.ids[applied.all(axis=1)]
    assert_share(both[:, 0] == both[:, 1], 1 / 15)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_a_fixed_interpolation_is_everywhere(interpolation: str) -> None:
    found = draw(np.arange(100), "rand", interpolation=interpolation).bicubic
    assert (found == (interpolation == "bicubic")).all()


@pytest.mark.parametrize("strength", [0.1, 0.4, 1.0])
def test_jitter_is_distributed_as_torchvisions(strength: float) -> None:
    ours = color_jitter(np.arange(NUM_DRAWS), strength=strength, seed=0, epoch=0)
    names = [Op.BRIGHTNESS, Op.CONTRAST, Op.COLOR]
    jitter: Any = ColorJitter(strength, strength, strength)
    ranges = [list(r) for r in (jitter.brightness, jitter.contrast, jitter.saturation)]
    torch.manual_seed(0)
    orders: list[list[Op]] = []
    factors: list[list[float]] = []
    for _ in range(NUM_DRAWS):
        order, *values, _hue = jitter.get_params(*ranges, jitter.hue)
        orders.append([names[at] for at in order.tolist() if at < 3])
        factors.append(values)
    for order in itertools.permutations(names):
        for found in (ours.ids, np.array(orders)):
            assert_share((found == np.array(order)).all(axis=1), 1 / 6)
    for at, name in enumerate(names):
        assert_alike(ours.args[ours.ids == name], np.array(factors)[:, at])
    assert ours.args.min() >= 1 - strength
    assert ours.args.max() <= 1 + strength
