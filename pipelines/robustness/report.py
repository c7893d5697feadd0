"""Report the measured robustness: a table, and a plot."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from pipelines.robustness.scores import NUM_IMAGENET_CLASSES, Errors


def table(result: Mapping[str, Any]) -> str:
    """Format a result of `evaluate_checkpoint` as lines of text."""
    lines: list[str] = []
    if "corruptions" in result:
        lines += _corruption_lines(result["corruptions"])
    if "perturbations" in result:
        lines += _perturbation_lines(result["perturbations"])
    return "\n".join(lines)


def _corruption_lines(found: Mapping[str, Any]) -> list[str]:
    errors: Errors = found["errors"]
    severities = list(next(iter(errors.values())))
    head = "".join(f"{severity:>8}" for severity in severities)
    lines = [f"{'error (%) at severity':<22}{head}{'mean':>8}"]
    for name, of_name in errors.items():
        numbers = [*of_name.values(), fmean(of_name.values())]
        lines.append(f"{name:<22}" + "".join(f"{value:8.2f}" for value in numbers))
    lines.append(
        f"mean error {found['mean_error']:.2f} %  mCE {found['mce']:.2f} %  "
        f"relative mCE {found['relative_mce']:.2f} %"
    )
    num_classes = found["num_classes"]
    if num_classes != NUM_IMAGENET_CLASSES:
        lines.append(
            "mCE is in units of AlexNet's errors on the 1,000 classes of ImageNet-1K: "
            f"on these {num_classes:,} classes only the mean error says something"
        )
    return lines


def _perturbation_lines(found: Mapping[str, Any]) -> list[str]:
    lines = [f"{'perturbation':<22}{'frames':>8}{'flips (%)':>12}"]
    for name, flips in found["flips"].items():
        lines.append(f"{name:<22}{found['num_frames'][name]:8d}{flips:12.3f}")
    rate = f"  mFR {found['mfr']:.2f} %" if "mfr" in found else ""
    lines.append(f"mFP {found['mfp']:.3f} %{rate}")
    return lines


def draw(result: Mapping[str, Any], *, path: Path) -> None:
    """Plot errors by severity and the flips of each perturbation into a file."""
    from matplotlib.figure import Figure

    parts = [name for name in ("corruptions", "perturbations") if name in result]
    figure = Figure(figsize=(9, 4.5 * len(parts)), layout="constrained")
    for place, part in zip(
        figure.subplots(len(parts), 1, squeeze=False)[:, 0], parts, strict=True
    ):
        if part == "corruptions":
            _draw_errors(
                place, result[part]["errors"], clean_error=100 - result["top1"]
            )
        else:
            flips = result[part]["flips"]
            place.barh(list(flips), list(flips.values()))
            place.invert_yaxis()
            place.set_xlabel("flip probability (%)")
    figure.savefig(path, dpi=110)


def _draw_errors(place: Any, errors: Errors, *, clean_error: float) -> None:
    severities = list(next(iter(errors.values())))
    # Ten colours go round: dashes tell the first ten from the others.
    for at, (name, of_name) in enumerate(errors.items()):
        style = "-" if at < 10 else "--"
        place.plot(severities, list(of_name.values()), style, marker="o", label=name)
    place.axhline(clean_error, color="black", linewidth=1, label="clean")
    place.set_xticks(severities)
    place.set_xlabel("severity")
    place.set_ylabel("top-1 error (%)")
    place.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8, handlelength=4)
