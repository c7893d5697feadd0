"""A held-out share: stratified, seeded, whole groups, whatever the order of files."""

from __future__ import annotations

import io
from collections import Counter

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from pipelines.shards.alike import (
    MAX_BITS,
    MAX_LEVELS,
    Look,
    groups_of,
    hashes_of,
    look_at,
)
from pipelines.shards.share import held_out_rows
from pipelines.transforms.headers import BadImageError
from tests.small_sets import jpeg

pytestmark = pytest.mark.fast

# Rows of a class and a group: few groups, so that many hold several images.
ROWS = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, 12)), min_size=1, max_size=60
)


def held_out(rows: list[tuple[int, int]], *, share: float, seed: int) -> np.ndarray:
    labels, groups = np.array(rows).T
    keys = [f"{at}.jpg" for at in range(len(rows))]
    return held_out_rows(labels, groups=groups, keys=keys, share=share, seed=seed)


@given(rows=ROWS, share=st.floats(0.01, 0.99), seed=st.integers(0, 3))
def test_groups_stay_whole_and_every_class_is_trained_on(
    rows: list[tuple[int, int]], share: float, seed: int
) -> None:
    chosen = held_out(rows, share=share, seed=seed)
    held = {group for (_, group), one in zip(rows, chosen, strict=True) if one}
    assert not held & {g for (_, g), one in zip(rows, chosen, strict=True) if not one}
    for label, num in Counter(label for label, _ in rows).items():
        of_class = [
            one for (of, _), one in zip(rows, chosen, strict=True) if of == label
        ]
        assert sum(of_class) <= min(max(round(share * num), 1), num - 1)


@given(
    counts=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    share=st.floats(0.01, 0.99),
)
def test_images_that_are_all_different_are_held_out_to_the_image(
    counts: list[int], share: float
) -> None:
    labels = [label for label, num in enumerate(counts) for _ in range(num)]
    rows = [(label, at) for at, label in enumerate(labels)]
    chosen = held_out(rows, share=share, seed=0)
    found = np.bincount(np.array(labels)[chosen], minlength=len(counts)).tolist()
    assert found == [min(max(round(share * num), 1), num - 1) for num in counts]


@given(rows=ROWS, seed=st.integers(0, 3), order=st.randoms(use_true_random=False))
def test_the_order_of_files_changes_nothing(
    rows: list[tuple[int, int]], seed: int, order: object
) -> None:
    labels, groups = np.array(rows).T
    keys = [f"{at}.jpg" for at in range(len(rows))]
    places = list(range(len(rows)))
    order.shuffle(places)  # type: ignore[attr-defined]
    chosen = held_out(rows, share=0.3, seed=seed)
    # A group's number is that of one of its images: it moves with the order too.
    moved = held_out_rows(
        labels[places],
        groups=100 - groups[places],
        keys=[keys[at] for at in places],
        share=0.3,
        seed=seed,
    )
    assert moved.tolist() == chosen[places].tolist()


def test_another_seed_holds_out_others() -> None:
    rows = [(0, at) for at in range(100)]
    chosen = [held_out(rows, share=0.1, seed=seed) for seed in range(2)]
    assert chosen[0].sum() == chosen[1].sum() == 10
    assert (chosen[0] != chosen[1]).any()


def saved(image: Image.Image, kind: str = "JPEG", **settings: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **settings)
    return buffer.getvalue()


def looks(*contents: bytes) -> list[Look]:
    return [look_at(content) for content in contents]


def test_copies_of_a_picture_are_one_group_and_other_pictures_none() -> None:
    large = [
        Image.open(io.BytesIO(jpeg(number, size=(320, 240)))) for number in range(60)
    ]
    whole = [saved(image, quality=90) for image in large]
    copies = [
        whole[3],
        saved(large[3], quality=40),
        saved(large[3].resize((160, 120)), quality=80),
        saved(large[3], "PNG"),
    ]
    groups = groups_of(looks(*whole, *copies)).tolist()
    assert groups[:60] == list(range(60))
    assert groups[60:] == [3, 3, 3, 3]


def test_groups_are_closed_over_chains() -> None:
    def look(level: int) -> Look:
        thumbnail = np.full((8, 9, 3), level, np.uint8)
        return Look(digest=bytes([level]), thumbnail=thumbnail, width=9, height=8)

    # The first and the last are 16 levels apart, each from the next 8.
    assert groups_of([look(16), look(0), look(8)]).tolist() == [0, 0, 0]
    assert groups_of([look(0), look(16), look(0)]).tolist() == [0, 1, 0]
    assert groups_of([]).tolist() == []


# One bit in each band but the last.
@example(value=0, flips={7, 10, 29, 32})
@given(value=st.integers(0, 2**64 - 1), flips=st.sets(st.integers(0, 63), max_size=6))
def test_near_hashes_are_found_wherever_they_differ(
    value: int, flips: set[int]
) -> None:
    values = [value, value ^ sum(1 << bit for bit in flips)]
    thumbnails = np.stack([picture_of(one) for one in values])
    first, second = hashes_of(thumbnails)
    assert np.bitwise_count(first ^ second) == len(flips)
    looks = [
        Look(digest=b"%d" % at, thumbnail=picture, width=9, height=8)
        for at, picture in enumerate(thumbnails)
    ]
    gap = np.abs(thumbnails[0].astype(int) - thumbnails[1]).mean()
    is_alike = len(flips) <= MAX_BITS and gap <= MAX_LEVELS
    assert groups_of(looks).tolist() == [0, 0 if is_alike or not flips else 1]


def picture_of(bits: int) -> np.ndarray:
    """Draw rows that step up or down by one, as the hash's bits say."""
    steps = np.array([1 if bits >> at & 1 else -1 for at in range(64)]).reshape(8, 8)
    grey = 128 + np.concatenate([np.zeros((8, 1), int), steps.cumsum(axis=1)], axis=1)
    return np.repeat(grey.astype(np.uint8)[:, :, None], 3, axis=2)


def test_what_is_no_image_is_refused() -> None:
    with pytest.raises(BadImageError):
        look_at(b"\xff\xd8\xff nothing more")
    with pytest.raises(BadImageError, match="not an image"):
        look_at(b"text")
