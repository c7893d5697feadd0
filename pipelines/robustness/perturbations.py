"""Generate sequences of slightly changing images as ImageNet-P does: 10 kinds.

Hendrycks & Dietterich (arXiv 1903.12261). A sequence begins with an image a little
larger than the model's, so that what moves in from outside is there; frames are its
middle. Steps from frame to frame are the published ones for every number of frames.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal, get_args

import numpy as np
from PIL import Image

from pipelines.robustness.blur import smear
from pipelines.robustness.corruptions import quantized, random_of
from pipelines.robustness.noise import add_gaussian, count_photons
from pipelines.robustness.weather import Snow, brightened, flakes, snowed

Perturbation = Literal[
    "gaussian_noise",
    "shot_noise",
    "motion_blur",
    "zoom_blur",
    "snow",
    "brightness",
    "translate",
    "rotate",
    "tilt",
    "scale",
]
PERTURBATIONS: tuple[Perturbation, ...] = get_args(Perturbation)
NOISES: tuple[Perturbation, ...] = ("gaussian_noise", "shot_noise")
"""Their frames do not follow from each other: each is compared with the first."""

_NUM_FRAMES = 31
_NUM_TRANSLATED = 41
_NOISE_STD = 0.03
_NUM_PHOTONS = 300
_SNOW = Snow(
    mean=0.05, std=0.3, zoom=3, threshold=0.5, radius=14, smear_std=4, kept=0.85
)


def num_frames_of(perturbation: Perturbation, *, at_most: int = 0) -> int:
    """Return a sequence's number of frames: the published one, or fewer."""
    published = _NUM_TRANSLATED if perturbation == "translate" else _NUM_FRAMES
    return min(at_most or published, published)


def frames(
    pixels: np.ndarray,
    *,
    perturbation: Perturbation,
    img_size: int,
    num_frames: int,
    seed: int,
    row_id: int,
) -> Iterator[np.ndarray]:
    """Yield the frames of an image's sequence: uint8 (img_size, img_size, 3) each.

    Args:
        pixels: uint8 (S, S, 3) with S of at least img_size.
        num_frames: Of a sweep those in its middle are taken; noise and zoom blur
            begin with the image as it is.
    """
    middle = _middle(pixels, img_size=img_size)
    first = (num_frames_of(perturbation) - num_frames) // 2
    swept = range(first, first + num_frames)
    match perturbation:
        case "gaussian_noise" | "shot_noise":
            random = random_of(seed, f"{perturbation} sequence", row_id)
            yield middle
            for _ in range(num_frames - 1):
                if perturbation == "shot_noise":
                    noisy = count_photons(middle, num=_NUM_PHOTONS, random=random)
                else:
                    noisy = add_gaussian(middle, std=_NOISE_STD, random=random)
                yield quantized(noisy)
        case "motion_blur":
            for at in swept:
                blurred = smear(middle, radius=10, std=3, angle_deg=4 * (at - 30))
                yield quantized(blurred)
        case "zoom_blur":
            total = np.zeros(middle.shape)
            for at in range(num_frames):
                larger = _about_centre(pixels, np.diag([1 + 0.004 * at] * 2))
                total += _middle(larger, img_size=img_size)
                yield quantized(total / (at + 1))
        case "snow":
            random = random_of(seed, "snow sequence", row_id)
            layer = flakes(img_size, img_size, snow=_SNOW, random=random)
            for at in swept:
                angle_deg = 4 * at - 150
                yield quantized(snowed(middle, layer, snow=_SNOW, angle_deg=angle_deg))
        case "brightness":
            for at in swept:
                yield quantized(brightened(middle, by=0.02 * (at - 15)))
        case "translate" | "rotate" | "tilt" | "scale":
            for at in swept:
                moved = _warped(pixels, _motion(perturbation, at=at, size=len(pixels)))
                yield _middle(moved, img_size=img_size)


def _middle(pixels: np.ndarray, *, img_size: int) -> np.ndarray:
    # As evaluation rounds the corner of its crop.
    start = round((len(pixels) - img_size) / 2)
    return np.ascontiguousarray(
        pixels[start : start + img_size, start : start + img_size]
    )


def _motion(
    perturbation: Literal["translate", "rotate", "tilt", "scale"],
    *,
    at: int,
    size: int,
) -> np.ndarray:
    """Build frame `at`'s map of coordinates (x, y, 1) about the centre: (3, 3)."""
    motion = np.eye(3)
    match perturbation:
        case "translate":
            motion[0, 2] = at - 20
        case "rotate":
            angle_rad = math.radians(at - 15)
            cos, sin = math.cos(angle_rad), math.sin(angle_rad)
            motion[:2, :2] = [[cos, -sin], [sin, cos]]
        case "scale":
            motion[:2, :2] *= 0.4 + 0.025 * at
        case "tilt":
            motion = _tilt(math.radians(at - 15), size=size)
    return motion


def _tilt(angle_rad: float, *, size: int) -> np.ndarray:
    """Build the map of a turn about both axes, seen from a diagonal away."""
    cos, sin = math.cos(angle_rad), math.sin(angle_rad)
    about_x = np.array([[1, 0, 0], [0, cos, -sin], [0, sin, cos]])
    about_y = np.array([[cos, 0, -sin], [0, 1, 0], [sin, 0, cos]])
    # The picture lies one pixel off the axes it is turned about: (x, y, 1).
    turned = about_x @ about_y
    away = math.sqrt(2) * size
    turned[2] += [0, 0, away]
    return np.diag([away, away, 1]) @ turned


def _about_centre(pixels: np.ndarray, linear: np.ndarray) -> np.ndarray:
    motion = np.eye(3)
    motion[:2, :2] = linear
    return _warped(pixels, motion)


def _warped(pixels: np.ndarray, motion: np.ndarray) -> np.ndarray:
    """Warp an image (S, S, 3) bilinearly, black beyond its border.

    Args:
        motion: (3, 3), homogeneous, from old to new places about the centre.
    """
    centre = np.eye(3)
    centre[:2, 2] = len(pixels) / 2
    back = np.linalg.inv(centre @ motion @ np.linalg.inv(centre))
    moved = Image.fromarray(pixels).transform(
        (len(pixels), len(pixels)),
        Image.Transform.PERSPECTIVE,
        (back / back[2, 2]).ravel()[:8].tolist(),
        Image.Resampling.BILINEAR,
    )
    return np.asarray(moved)
