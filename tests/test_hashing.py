"""Counter draws: published values, uniform, and free of order and batches."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.rng import Purpose, key, mix64, seeded_order, uniform

NUM = 20_000


def test_mix64_is_splitmix64() -> None:
    golden = 0x9E3779B97F4A7C15
    states = [n * golden % 2**64 for n in range(3)]
    # The first outputs of SplitMix64 with seed 0, as its authors' code prints them.
    wanted = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert mix64(np.array(states, dtype=np.uint64)).tolist() == wanted


@given(st.lists(st.integers(-(2**63), 2**64 - 1), min_size=1, max_size=4))
def test_a_key_depends_on_every_part_and_its_place(parts: list[int]) -> None:
    assert 0 <= key(*parts) < 2**64
    assert key(*parts) == key(*parts)
    assert key(*parts) != key(parts[0] + 1, *parts[1:])
    assert key(*parts) != key(*parts, 0)
    if parts != parts[::-1]:
        assert key(*parts) != key(*parts[::-1])


def test_draws_are_uniform_and_independent() -> None:
    draws = uniform(np.arange(NUM), key=key(7, 0, Purpose.CROP), num_draws=4)
    assert draws.shape == (NUM, 4)
    assert draws.dtype == np.float64
    assert draws.min() >= 0
    assert draws.max() < 1
    # Five standard errors each: of a mean, of a bin's count, of a correlation.
    assert np.abs(draws.mean(axis=0) - 0.5).max() < 5 * np.sqrt(1 / 12 / NUM)
    counts = np.histogram(draws, bins=16, range=(0, 1))[0]
    assert np.abs(counts - NUM / 4).max() < 5 * np.sqrt(NUM / 4)
    neighbours = np.concatenate([draws[:-1], draws[1:]], axis=1)
    correlations = np.corrcoef(neighbours.T) - np.eye(8)
    assert np.abs(correlations).max() < 5 / np.sqrt(NUM)


def test_draws_for_other_purposes_epochs_and_seeds_do_not_resemble_each_other() -> None:
    keys = [key(s, e, p) for s in (0, 1) for e in (0, 1) for p in (3, 4)]
    draws = [uniform(np.arange(NUM), key=k)[:, 0] for k in keys]
    correlations = np.corrcoef(draws) - np.eye(len(keys))
    assert np.abs(correlations).max() < 5 / np.sqrt(NUM)


def test_draws_do_not_depend_on_order_batch_or_type() -> None:
    ids = np.arange(1000)
    wanted = uniform(ids, key=5, num_draws=3)
    order = np.random.default_rng(0).permutation(1000)
    assert np.array_equal(uniform(ids[order], key=5, num_draws=3), wanted[order])
    parts = [uniform(part, key=5, num_draws=3) for part in np.array_split(ids, 7)]
    assert np.array_equal(np.concatenate(parts), wanted)
    small = uniform(ids.astype(np.int32), key=5, num_draws=2)
    assert np.array_equal(small, wanted[:, :2])


@pytest.mark.parametrize("num", [0, 1, 5, 3000])
def test_seeded_order_is_a_permutation(num: int) -> None:
    order = seeded_order(num, key=9)
    assert sorted(order.tolist()) == list(range(num))
    if num > 100:
        assert abs(np.corrcoef(order, np.arange(num))[0, 1]) < 5 / np.sqrt(num)
        assert not np.array_equal(order, seeded_order(num, key=10))
