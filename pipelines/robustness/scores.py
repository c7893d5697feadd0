"""Compute mCE, relative mCE and flip rates from errors and flips.

As defined by Hendrycks & Dietterich (arXiv 1903.12261, section 3), relative to AlexNet
on ImageNet-1K. Errors and flip probabilities are percent.
"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean
from types import MappingProxyType

from pipelines.robustness.corruptions import SEVERITIES, Corruption
from pipelines.robustness.perturbations import Perturbation

Errors = Mapping[Corruption, Mapping[int, float]]
"""Top-1 error of each corruption and severity."""

NUM_IMAGENET_CLASSES = 1000
ALEXNET_CLEAN_ERROR = 43.5
"""Of torchvision's weights, which the authors took: they state 56.522 % top-1."""


def _by_severity(*errors: float) -> Mapping[int, float]:
    return MappingProxyType(dict(zip(SEVERITIES, errors, strict=True)))


# The authors' own figures for each severity, rounded to 0.01: issue 10 of their
# repository, hendrycks/robustness.
ALEXNET_ERRORS: Errors = MappingProxyType(
    {
        "gaussian_noise": _by_severity(69.53, 82.54, 93.55, 98.14, 99.45),
        "shot_noise": _by_severity(71.22, 85.11, 93.57, 98.18, 99.15),
        "impulse_noise": _by_severity(78.37, 89.81, 94.87, 98.72, 99.55),
        "defocus_blur": _by_severity(65.62, 73.20, 85.04, 91.36, 94.71),
        "glass_blur": _by_severity(64.31, 75.05, 88.81, 91.62, 93.34),
        "motion_blur": _by_severity(58.43, 70.05, 82.11, 89.75, 92.64),
        "zoom_blur": _by_severity(70.01, 76.99, 80.78, 84.20, 87.20),
        "snow": _by_severity(71.73, 88.39, 86.47, 91.87, 94.95),
        "frost": _by_severity(61.39, 79.73, 88.79, 89.94, 93.43),
        "fog": _by_severity(67.47, 76.05, 84.38, 87.26, 94.50),
        "brightness": _by_severity(45.14, 48.50, 54.05, 62.17, 72.44),
        "contrast": _by_severity(64.55, 76.15, 88.87, 97.76, 99.27),
        "elastic_transform": _by_severity(52.60, 70.12, 55.69, 64.08, 80.55),
        "pixelate": _by_severity(52.22, 54.62, 73.73, 87.09, 91.26),
        "jpeg_compression": _by_severity(51.00, 54.72, 57.29, 65.46, 74.78),
    }
)


def corruption_error(
    errors: Mapping[int, float], *, reference: Mapping[int, float]
) -> float:
    """Compute CE: errors summed over severities, in percent of a reference's."""
    return 100 * sum(errors.values()) / sum(reference[at] for at in errors)


def relative_corruption_error(
    errors: Mapping[int, float],
    *,
    clean_error: float,
    reference: Mapping[int, float],
    reference_clean_error: float,
) -> float:
    """Compute relative CE: the same of the error above the clean one."""
    added = sum(error - clean_error for error in errors.values())
    reference_added = sum(reference[at] - reference_clean_error for at in errors)
    return 100 * added / reference_added


def corruption_scores(errors: Errors, *, clean_error: float) -> dict[str, float]:
    """Compute mean error, mCE and relative mCE of what was measured.

    Where severities or corruptions were left out, so are AlexNet's.
    """
    absolute = [
        corruption_error(found, reference=ALEXNET_ERRORS[name])
        for name, found in errors.items()
    ]
    relative = [
        relative_corruption_error(
            found,
            clean_error=clean_error,
            reference=ALEXNET_ERRORS[name],
            reference_clean_error=ALEXNET_CLEAN_ERROR,
        )
        for name, found in errors.items()
    ]
    return {
        "mean_error": fmean(fmean(found.values()) for found in errors.values()),
        "mce": fmean(absolute),
        "relative_mce": fmean(relative),
    }


def flip_scores(
    flips: Mapping[Perturbation, float],
    *,
    reference: Mapping[Perturbation, float] | None = None,
) -> dict[str, float]:
    """Compute mFP, the mean flip probability, and mFR, in percent of a reference's.

    The reference is what this tool measured of another checkpoint. AlexNet's own flip
    probabilities are not built in: we found no source to check them against, and they
    are of the published videos, not of sequences made on the fly.
    """
    scores = {"mfp": fmean(flips.values())}
    if reference is not None:
        rates = [100 * flips[name] / reference[name] for name in flips]
        scores["mfr"] = fmean(rates)
    return scores
