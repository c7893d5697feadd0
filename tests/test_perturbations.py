"""Perturbation sequences: what each frame is, beside the image it is made of."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from PIL import Image
from skimage import data

from pipelines.robustness.perturbations import (
    NOISES,
    PERTURBATIONS,
    Perturbation,
    frames,
    num_frames_of,
)

SIZE, MARGIN = 56, 4
PIXELS = np.asarray(
    Image.fromarray(data.astronaut()).resize((SIZE + 2 * MARGIN, SIZE + 2 * MARGIN))
)
MIDDLE = PIXELS[MARGIN:-MARGIN, MARGIN:-MARGIN]


def sequence(
    perturbation: Perturbation,
    *,
    pixels: np.ndarray = PIXELS,
    num_frames: int = 0,
    row_id: int = 3,
) -> list[np.ndarray]:
    return list(
        frames(
            pixels,
            perturbation=perturbation,
            img_size=SIZE,
            num_frames=num_frames_of(perturbation, at_most=num_frames),
            seed=1,
            row_id=row_id,
        )
    )


@pytest.mark.parametrize("perturbation", PERTURBATIONS)
def test_a_sequence_changes_little_by_little(perturbation: Perturbation) -> None:
    found = sequence(perturbation)
    assert len(found) == (41 if perturbation == "translate" else 31)
    assert {frame.shape for frame in found} == {MIDDLE.shape}
    assert {frame.dtype for frame in found} == {np.dtype(np.uint8)}
    # Drawn for the image alone.
    np.testing.assert_array_equal(sequence(perturbation), found)
    draws = perturbation in (*NOISES, "snow")
    same = np.array_equal(sequence(perturbation, row_id=4), found)
    assert draws != same
    steps = [
        np.abs(after.astype(float) - before).mean()
        for before, after in itertools.pairwise(found)
    ]
    # Smears 2 degrees left and right of the vertical fall on the same pixels.
    assert np.count_nonzero(steps) >= len(steps) - (perturbation == "motion_blur")
    if perturbation not in NOISES:
        ends = np.abs(found[-1].astype(float) - found[0]).mean()
        assert max(steps) < ends


@pytest.mark.parametrize("num_frames", [2, 5, 30])
@pytest.mark.parametrize("perturbation", PERTURBATIONS)
def test_a_shorter_sequence_is_a_part_of_it(
    perturbation: Perturbation, num_frames: int
) -> None:
    whole = sequence(perturbation)
    part = sequence(perturbation, num_frames=num_frames)
    assert len(part) == num_frames
    begins = perturbation in (*NOISES, "zoom_blur")
    first = 0 if begins else (len(whole) - num_frames) // 2
    np.testing.assert_array_equal(part, whole[first : first + num_frames])


@pytest.mark.parametrize(
    ("perturbation", "at"),
    [
        ("gaussian_noise", 0),
        ("shot_noise", 0),
        ("zoom_blur", 0),
        ("brightness", 15),
        ("translate", 20),
        ("rotate", 15),
        ("scale", 24),
    ],
)
def test_one_frame_is_the_image_itself(perturbation: Perturbation, at: int) -> None:
    np.testing.assert_allclose(sequence(perturbation)[at], MIDDLE, atol=1)


def test_noise_is_drawn_anew_for_each_frame() -> None:
    gaussian = np.stack(sequence("gaussian_noise")[1:]) - MIDDLE.astype(float)
    inside = (MIDDLE > 60) & (MIDDLE < 195)
    assert gaussian[:, inside].std() == pytest.approx(255 * 0.03, rel=0.02)
    near = np.corrcoef(gaussian[0, inside], gaussian[1, inside])[0, 1]
    assert abs(near) < 0.05
    shot = np.stack(sequence("shot_noise")[1:]) - MIDDLE.astype(float)
    variance = shot[:, inside].var(axis=0, ddof=1)
    wanted = MIDDLE[inside].astype(float) * 255 / 300
    assert variance.mean() == pytest.approx(wanted.mean(), rel=0.03)


def test_translation_is_by_whole_pixels_and_shows_what_lay_outside() -> None:
    found = sequence("translate")
    for by in range(-MARGIN, MARGIN + 1):
        moved = PIXELS[MARGIN:-MARGIN, MARGIN - by : MARGIN - by + SIZE]
        np.testing.assert_array_equal(found[20 + by], moved)
    assert not found[20 + MARGIN + 1][:, 0].any()  # and black beyond


def test_scale_and_rotation_are_about_the_centre() -> None:
    small = sequence("scale")[0].astype(float)
    size = round(0.4 * len(PIXELS))
    box = Image.fromarray(PIXELS).resize((size, size))
    start = (SIZE - size) // 2
    part = small[start : start + size, start : start + size]
    assert np.abs(part - np.asarray(box)).mean() < 12
    assert not small[: start - 1].any()
    turned = Image.fromarray(PIXELS).rotate(-15, Image.Resampling.BILINEAR)
    wanted = np.asarray(turned)[MARGIN:-MARGIN, MARGIN:-MARGIN]
    np.testing.assert_allclose(sequence("rotate")[-1], wanted, atol=1)


def test_tilt_is_seen_from_a_diagonal_away() -> None:
    # Untilted, the picture lies a pixel behind the point a diagonal away.
    found = sequence("tilt")
    away = math.sqrt(2) * len(PIXELS)
    size = len(PIXELS) * away / (away + 1)
    border = (len(PIXELS) - size) / 2
    assert 0 < border < 1
    assert np.abs(found[15].astype(float) - MIDDLE).mean() < 8
    # Tilting back by as much is tilting the picture that stands on its head.
    flipped = sequence("tilt", pixels=PIXELS[::-1, ::-1].copy())
    for by in (3, 15):
        there = found[15 + by].astype(float)
        back = flipped[15 - by][::-1, ::-1].astype(float)
        other = found[15 - by].astype(float)
        assert np.abs(there - back).mean() < np.abs(there - other).mean() / 2


def test_zoom_blur_is_a_mean_of_zooms() -> None:
    found = np.stack(sequence("zoom_blur")).astype(float)
    # Each frame holds 1 / n of a new zoom: the later, the smaller the step.
    steps = np.abs(np.diff(found, axis=0)).mean(axis=(1, 2, 3))
    assert steps[-1] < steps[:5].max()
    assert np.abs(found[-1] - MIDDLE).mean() > np.abs(found[3] - MIDDLE).mean()
