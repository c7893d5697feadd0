"""Drawn operations have timm's statistics, and depend on the sample alone."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.data.auto_augment import LEVEL_TO_ARG, rand_augment_transform
from torchvision.transforms import ColorJitter

from pipelines.ingest.ops import Op, Ops, color_jitter, rand_augment
from pipelines.ingest.policy import parse_rand_augment

NUM = 20_000
POLICY = "rand-m9-mstd0.5-inc1"
# timm's names in the order of `Op`, for the increasing set and the plain one.
NAMES = [
    [op.name for op in rand_augment_transform(f"rand-m9-inc{inc}", {}).ops]
    for inc in (0, 1)
]


def draw(ids: np.ndarray, *, text: str = POLICY, seed: int = 0, epoch: int = 0) -> Ops:
    return rand_augment(
        ids,
        policy=parse_rand_augment(text),
        seed=seed,
        epoch=epoch,
        interpolation="random",
    )


def test_operations_are_timms_in_timms_order() -> None:
    for names in NAMES:
        plain = [name.replace("Increasing", "").replace("Rel", "") for name in names]
        ours = [op.name.replace("_", "").lower() for op in list(Op)[1:]]
        assert [name.lower() for name in plain] == ours


def test_operations_come_at_timms_rates() -> None:
    found = draw(np.arange(NUM))
    assert found.ids.shape == found.args.shape == found.bicubic.shape == (NUM, 2)
    share = (found.ids > 0).mean()
    assert abs(share - 0.5) < 5 * math.sqrt(0.25 / (2 * NUM))
    counts = np.bincount(found.ids.ravel(), minlength=16)[1:]
    wanted = NUM / 15
    assert np.abs(counts - wanted).max() < 5 * math.sqrt(wanted)
    assert abs(found.bicubic.mean() - 0.5) < 5 * math.sqrt(0.25 / (2 * NUM))
    # The two layers know nothing of each other.
    pairs = np.bincount(found.ids[:, 0] * 16 + found.ids[:, 1], minlength=256)
    both = pairs.reshape(16, 16)[1:, 1:]
    expected = NUM / 4 / 225
    assert np.abs(both - expected).max() < 6 * math.sqrt(expected)


def timms_args(text: str, *, name: str, num: int) -> np.ndarray:
    """Draw arguments with timm's own code."""
    (op,) = [op for op in rand_augment_transform(text, {}).ops if op.name == name]
    seen: list[float] = []
    op.prob = 1.0
    op.aug_fn = lambda image, *args, **kwargs: seen.append(args[0])
    random.seed(3)
    for _ in range(num):
        op(None)
    return np.array(seen, float)


@pytest.mark.parametrize("text", [POLICY, "rand-m9-mstd0.5", "rand-m5-mstd101-inc1"])
@pytest.mark.parametrize("place", range(15))
def test_arguments_are_distributed_as_timms(text: str, place: int) -> None:
    name = NAMES["inc1" in text][place]
    found = draw(np.arange(NUM), text=text)
    ours = found.args[found.ids == place + 1]
    if LEVEL_TO_ARG[name] is None:
        assert not ours.any()
        return
    theirs = timms_args(text, name=name, num=4000)
    # The largest distance between the two distributions (Kolmogorov and Smirnov), for
    # a chance of a false alarm below one in ten thousand.
    grid = np.unique(np.round(np.concatenate([ours, theirs]), 9))
    cdfs = [
        np.searchsorted(np.sort(np.round(values, 9)), grid, side="right") / len(values)
        for values in (ours, theirs)
    ]
    bound = 2.23 * math.sqrt(1 / len(ours) + 1 / len(theirs))
    assert np.abs(cdfs[0] - cdfs[1]).max() < bound


def test_jitter_is_torchvisions() -> None:
    found = color_jitter(np.arange(NUM), strength=0.4, seed=0, epoch=0)
    assert (np.sort(found.ids, axis=1) == [Op.COLOR, Op.CONTRAST, Op.BRIGHTNESS]).all()
    orders = np.unique(found.ids, axis=0, return_counts=True)[1]
    assert len(orders) == 6
    assert np.abs(orders - NUM / 6).max() < 5 * math.sqrt(NUM / 6)
    factors = ColorJitter(0.4, 0.4, 0.4).brightness
    assert factors == (0.6, 1.4)
    for op in (Op.COLOR, Op.CONTRAST, Op.BRIGHTNESS):
        args = found.args[found.ids == op]
        assert 0.6 <= args.min() < 0.601 < 1.399 < args.max() <= 1.4
        assert abs(args.mean() - 1) < 5 * 0.8 / math.sqrt(12 * NUM)
    strong = color_jitter(np.arange(NUM), strength=1.0, seed=0, epoch=0)
    assert strong.args.min() >= 0


@given(
    ids=st.lists(st.integers(0, 2**50), min_size=1, max_size=20, unique=True),
    epoch=st.integers(0, 5),
    order=st.randoms(use_true_random=False),
)
@settings(max_examples=50, deadline=None)
def test_a_sample_draws_the_same_in_any_company(
    ids: list[int], epoch: int, order: random.Random
) -> None:
    whole = draw(np.array(ids), epoch=epoch)
    places = list(range(len(ids)))
    order.shuffle(places)
    for at in places:
        alone = draw(np.array([ids[at]]), epoch=epoch)
        for name, values in vars(alone).items():
            assert np.array_equal(values[0], getattr(whole, name)[at])
    jittered = color_jitter(np.array(ids), strength=0.3, seed=1, epoch=epoch)
    alone = color_jitter(np.array(ids[-1:]), strength=0.3, seed=1, epoch=epoch)
    assert np.array_equal(alone.args[0], jittered.args[-1])


def test_draws_change_with_epoch_and_seed() -> None:
    ids = np.arange(200)
    first = draw(ids)
    for other in (draw(ids, epoch=1), draw(ids, seed=1)):
        assert (first.ids != other.ids).mean() > 0.3
