"""Draw random numbers from counters: a stateless, counter-based generator.

A draw depends on (seed, epoch, sample, purpose) alone: not on the order in which
samples come, the batch they fall into, the worker, or what was drawn before.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MASK = 2**64 - 1
_CHUNK = 1 << 20


class Purpose(IntEnum):
    """Purpose of a draw, which separates random streams; values never change."""

    GROUPS = 1
    ROWS = 2
    CROP = 3
    FLIP = 4
    MIX = 5
    STEP = 6
    RANDAUGMENT = 7
    JITTER = 8
    ERASE = 9
    INTERPOLATION = 10
    BALANCE = 11


def mix64(values: np.ndarray) -> np.ndarray:
    """Hash 64-bit integers one to one: SplitMix64 (Steele et al., 2014).

    Args:
        values: uint64 array of any shape.
    """
    with np.errstate(over="ignore"):
        values = values + _GOLDEN
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return values ^ (values >> np.uint64(31))


def key(*parts: int) -> int:
    """Fold integers, such as (seed, epoch, purpose), into one 64-bit key."""
    folded = np.zeros(1, dtype=np.uint64)
    for part in parts:
        folded = mix64(folded ^ np.array([part & _MASK], dtype=np.uint64))
    return int(folded[0])


def uniform(counters: np.ndarray, *, key: int, num_draws: int = 1) -> np.ndarray:
    """Draw uniform numbers in [0, 1), `num_draws` for each counter.

    Args:
        counters: integer array of shape (n,), for example sample ids.

    Returns:
        float64 array of shape (n, num_draws).
    """
    with np.errstate(over="ignore"):
        start = mix64(counters.astype(np.uint64) ^ np.uint64(key))[:, None]
        bits = mix64(start + np.arange(num_draws, dtype=np.uint64) * _GOLDEN)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def seeded_order(num: int, *, key: int) -> np.ndarray:
    """Permute `range(num)`: int64 of shape (num,), fixed for ever by the key.

    NumPy's generators do not promise their streams across versions; this does.
    """
    # A hash a place, its last bits replaced by the place: sorting such numbers needs a
    # third of the memory of an argsort, and ties can't occur.
    places = np.arange(num, dtype=np.uint64)
    place_bits = np.uint64((1 << num.bit_length()) - 1)
    with np.errstate(over="ignore"):
        hashes = places + mix64(np.array([key & _MASK], dtype=np.uint64))
    for start in range(0, num, _CHUNK):
        hashes[start : start + _CHUNK] = mix64(hashes[start : start + _CHUNK])
    hashes &= ~place_bits
    hashes |= places
    del places
    hashes.sort()
    hashes &= place_bits
    return hashes.view(np.int64)
