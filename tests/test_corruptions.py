"""Corruptions: the published definitions, drawn for each image by itself."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage
from skimage import color, data

from pipelines.robustness import blur, digital, noise, weather
from pipelines.robustness.corruptions import (
    CORRUPTIONS,
    SEVERITIES,
    Corruption,
    corrupt,
    quantized,
    random_of,
)

SIZE = 64
# Nothing is drawn for these.
FIXED = {
    "defocus_blur",
    "zoom_blur",
    "brightness",
    "contrast",
    "pixelate",
    "jpeg_compression",
}
# As published, not every step up is further from the image: elastic's first two are
# another kind of movement than the rest, and so on.
UNEVEN = {"glass_blur", "snow", "frost", "fog", "elastic_transform"}


def photograph(source: Any = data.astronaut) -> np.ndarray:
    image = Image.fromarray(source()).convert("RGB").resize((SIZE, SIZE))
    return np.asarray(image)


PIXELS = photograph()
OTHERS = [photograph(data.coffee), photograph(data.chelsea)]


def seen(
    corruption: Corruption, severity: int, *, row_id: int = 3, seed: int = 1
) -> np.ndarray:
    return corrupt(
        PIXELS, corruption=corruption, severity=severity, seed=seed, row_id=row_id
    )


@pytest.mark.parametrize("severity", SEVERITIES)
@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_it_is_one_images_own(corruption: Corruption, severity: int) -> None:
    before = PIXELS.copy()
    found = seen(corruption, severity)
    assert found.shape == PIXELS.shape
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(PIXELS, before)
    assert not np.array_equal(found, PIXELS)
    # Whatever was made between, and whatever state others left behind.
    np.random.seed(severity)
    seen(corruption, severity, row_id=4)
    np.testing.assert_array_equal(seen(corruption, severity), found)
    draws = corruption not in FIXED
    for other in ({"row_id": 4}, {"seed": 2}):
        assert draws != np.array_equal(seen(corruption, severity, **other), found)


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_severity_leads_away_from_the_image(corruption: Corruption) -> None:
    np.testing.assert_array_equal(seen(corruption, 0), PIXELS)
    distances = []
    for severity in SEVERITIES:
        settings: Any = {"corruption": corruption, "severity": severity, "seed": 0}
        distances.append(
            np.mean(
                [
                    np.abs(corrupt(image, row_id=row, **settings) - image.astype(float))
                    for image in (PIXELS, *OTHERS)
                    for row in range(4)
                ]
            )
        )
    if corruption == "elastic_transform":
        assert distances[0] < distances[1]
        assert distances[2] < distances[4]
    elif corruption in UNEVEN:
        assert distances[0] < max(distances[1:])
    else:
        assert all(low < high for low, high in itertools.pairwise(distances))


def test_a_severity_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match="from 1 to 5, or 0 for none, got 6"):
        seen("fog", 6)


def test_draws_are_the_same_for_ever() -> None:
    # Two draws of RandomState seeded by our hash, as first computed.
    found = random_of(7, "snow", 2, 11).random_sample(2)
    assert found.tolist() == [0.248865209224165, 0.9993307722523762]
    others = [(8, "snow", 2, 11), (7, "fog", 2, 11), (7, "snow", 11, 2)]
    for seed, name, *parts in others:
        assert random_of(seed, name, *parts).random_sample() != found[0]


GREY = np.full((96, 96, 3), 100, np.uint8)
NUM = GREY.size


def test_noise_has_the_published_strength() -> None:
    random = random_of(0, "strength")
    gaussian = noise.gaussian_noise(GREY, severity=2, random=random)
    assert gaussian.mean() == pytest.approx(100, abs=4 * 30 / NUM**0.5)
    assert gaussian.std() == pytest.approx(255 * 0.12, rel=0.03)
    # A Poisson count has its mean for variance: 100 / 255 of 60 photons here.
    shot = noise.shot_noise(GREY, severity=1, random=random)
    assert shot.mean() == pytest.approx(100, rel=0.01)
    assert shot.var() == pytest.approx(100 * 255 / 60, rel=0.03)
    impulse = noise.impulse_noise(GREY, severity=5, random=random)
    assert np.mean(impulse == 255) == pytest.approx(0.27 / 2, rel=0.05)
    assert np.mean(impulse == 0) == pytest.approx(0.27 / 2, rel=0.05)


@pytest.mark.parametrize("severity", SEVERITIES)
def test_blur_leaves_a_flat_image_flat(severity: int) -> None:
    for function in (
        blur.defocus_blur,
        blur.glass_blur,
        blur.motion_blur,
        blur.zoom_blur,
    ):
        found = function(GREY, severity=severity, random=random_of(0, "flat"))
        np.testing.assert_allclose(found, 100, atol=2)


def test_defocus_is_a_disk() -> None:
    point = np.zeros((41, 41, 3), np.uint8)
    point[20, 20] = 255
    found = blur.defocus_blur(point, severity=3, random=random_of(0, ""))[:, :, 0]
    rows, columns = np.indices(found.shape) - 20
    far = np.hypot(rows, columns)
    num_inside = int((far <= 6).sum())
    assert found[far <= 4] == pytest.approx(255 / num_inside, rel=1e-6)
    np.testing.assert_allclose(found[far > 8], 0, atol=1e-9)
    assert found.sum() == pytest.approx(255)


@pytest.mark.parametrize("reach", [1, 2, 4])
def test_glass_takes_pixels_in_the_published_order(reach: int) -> None:
    height, width = 17, 14
    random = random_of(reach, "glass")
    moves = random.randint(-reach, reach, size=(2, height, width))
    values = random.random_sample((height, width))
    found = values.ravel()[blur.scattered(height, width, moves=moves, reach=reach)]
    for row in range(height - reach, reach, -1):
        for column in range(width - reach, reach, -1):
            down, right = moves[:, row, column]
            values[row, column] = values[row + down, column + right]
    np.testing.assert_array_equal(found.reshape(height, width), values)


@pytest.mark.parametrize(
    ("angle_deg", "step"), [(0, (0, -1)), (90, (-1, 0)), (-90, (1, 0))]
)
def test_a_smear_is_half_a_gaussian_along_its_angle(
    angle_deg: float, step: tuple[int, int]
) -> None:
    point = np.zeros((31, 31), np.uint8)
    point[15, 15] = 255
    found = blur.smear(point, radius=5, std=3, angle_deg=angle_deg)
    weights = np.exp(-(np.arange(11) ** 2) / 18)
    for at in range(11):
        value = found[15 + at * step[0], 15 + at * step[1]]
        assert value == pytest.approx(255 * weights[at] / weights.sum(), abs=0.6)
    assert found.sum() == pytest.approx(255, abs=6)


@pytest.mark.parametrize("factor", [1.0, 1.06, 1.3, 2.5, 4.0])
def test_zooming_is_scipys(factor: float) -> None:
    pixels = PIXELS.astype(np.float64)
    size = int(np.ceil(SIZE / factor))
    top = (SIZE - size) // 2
    part = pixels[top : top + size, top : top + size]
    large = np.asarray(ndimage.zoom(part, (factor, factor, 1), order=1))
    top = (len(large) - SIZE) // 2
    wanted = large[top : top + SIZE, top : top + SIZE]
    np.testing.assert_allclose(blur.zoomed(pixels, factor=factor), wanted, atol=1e-9)


@pytest.mark.parametrize("by", [-0.3, 0.0, 0.1, 0.5])
def test_brightness_is_hsvs_value(by: float) -> None:
    pixels = PIXELS.copy()
    pixels[0, :4] = [[0, 0, 0], [255, 255, 255], [1, 0, 0], [0, 255, 3]]
    hsv = color.rgb2hsv(pixels / 255)
    hsv[:, :, 2] = np.clip(hsv[:, :, 2] + by, 0, 1)
    found = weather.brightened(pixels, by=by)
    np.testing.assert_allclose(found, 255 * color.hsv2rgb(hsv), atol=1e-9)


def test_fog_is_a_cloud_from_0_to_1_and_keeps_the_brightest() -> None:
    cloud = weather.plasma(64, decay=1.7, random=random_of(0, "cloud"))
    assert cloud.min() == 0
    assert cloud.max() == 1
    # Neighbours on a torus are alike, its two borders too.
    rough = np.abs(cloud - np.roll(cloud, 1, axis=0))
    assert rough.mean() < np.abs(cloud - cloud.mean()).mean() / 2
    assert rough[0].mean() < 3 * rough.mean()
    for severity in SEVERITIES:
        found = weather.fog(PIXELS, severity=severity, random=random_of(0, "fog"))
        assert found.max() <= PIXELS.max() + 1e-9


def test_snow_and_frost_are_laid_over() -> None:
    black = np.zeros((SIZE, SIZE, 3), np.uint8)
    fallen = weather.snow(black, severity=1, random=random_of(0, "snow"))
    # The black whitens to a fifth of mid-grey; the same flakes fall from both sides.
    assert fallen.min() == pytest.approx(0.2 * 127.5)
    np.testing.assert_allclose(fallen, np.rot90(fallen, k=2))
    frozen = weather.frost(black, severity=5, random=random_of(0, "frost"))
    assert 0 < frozen.max() <= 0.75 * 255
    # An image that is larger than the photographs gets one that is enlarged.
    large = np.zeros((1100, 1100, 3), np.uint8)
    assert weather.frost(large, severity=1, random=random_of(0, "")).any()


def test_frost_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(weather.resources, "files", missing)
    weather._photograph.cache_clear()
    with pytest.raises(ValueError, match="install the extra 'robustness'"):
        seen("frost", 1)


def test_contrast_keeps_the_mean_and_shrinks_the_rest() -> None:
    found = digital.contrast(PIXELS, severity=4, random=random_of(0, ""))
    mean = PIXELS.mean(axis=(0, 1))
    np.testing.assert_allclose(found.mean(axis=(0, 1)), mean)
    np.testing.assert_allclose(found - mean, 0.1 * (PIXELS - mean))


def test_pixels_become_boxes_and_jpegs_blocks() -> None:
    found = digital.pixelate(PIXELS, severity=5, random=random_of(0, ""))
    boxes = found.reshape(16, 4, 16, 4, 3)
    assert (boxes == boxes[:, :1, :, :1]).all()
    means = PIXELS.reshape(16, 4, 16, 4, 3).mean(axis=(1, 3))
    np.testing.assert_allclose(boxes[:, 0, :, 0], means, atol=1)
    fine = np.abs(digital.through_jpeg(PIXELS, quality=95) - PIXELS.astype(float))
    coarse = np.abs(digital.through_jpeg(PIXELS, quality=7) - PIXELS.astype(float))
    assert fine.mean() < coarse.mean() / 2


def test_elastic_is_an_affine_map_where_the_waves_are_flat() -> None:
    # A ramp that is sheared stays a ramp: its second differences are nought inside.
    rows, columns = np.indices((120, 120))
    ramp = np.stack([rows, columns, rows + columns], axis=2).astype(np.uint8)
    found = digital.elastic_transform(ramp, severity=1, random=random_of(1, "ramp"))
    bend = np.abs(np.diff(found[50:70, 50:70], n=2, axis=0))
    assert bend.max() < 0.05
    assert np.abs(found[50:70, 50:70] - ramp[50:70, 50:70]).max() > 1


def test_levels_are_cut_downwards() -> None:
    found = quantized(np.array([-3.0, 0.99, 254.999, 300.0]))
    assert found.tolist() == [0, 0, 254, 255]
    assert found.dtype == np.uint8
