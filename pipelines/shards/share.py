"""Choose which images of a set are held out: a share of each class, by a seed."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence

import numpy as np


def held_out_rows(
    labels: np.ndarray,
    *,
    groups: np.ndarray,
    keys: Sequence[str],
    share: float,
    seed: int,
) -> np.ndarray:
    """Choose the images to hold out: bool (n,).

    Of each class the share, rounded, at least one image and at most all but one, so
    that a class of a single image stays in training. A group goes whole to one side.
    Which images are chosen depends on their keys and the seed, not on their order, and
    an image more or less changes little for the others.

    Args:
        labels: int64 (n,).
        groups: int64 (n,): images of one number stay together.
        keys: Names of the images, each once.
        share: Of each class's images.
        seed: Another holds out other images.
    """
    members: dict[int, list[int]] = {}
    for row, group in enumerate(groups.tolist()):
        members.setdefault(group, []).append(row)
    drawn = sorted(
        members.values(), key=lambda rows: min(_draw(keys[row], seed) for row in rows)
    )
    room = {
        label: min(max(round(share * num), 1), num - 1)
        for label, num in Counter(labels.tolist()).items()
    }
    chosen = np.zeros(len(labels), dtype=bool)
    for rows in drawn:
        wanted = Counter(labels[rows].tolist())
        if all(num <= room[label] for label, num in wanted.items()):
            chosen[rows] = True
            for label, num in wanted.items():
                room[label] -= num
    return chosen


def _draw(key: str, seed: int) -> bytes:
    text = f"{seed}/{key}".encode()
    return hashlib.blake2b(text, digest_size=16).digest()
