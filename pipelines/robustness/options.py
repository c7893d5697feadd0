"""Define what robustness is measured, as flags of `sovit-eval`."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path

import tyro

from pipelines.cli.outputs import check_plot
from pipelines.robustness.corruptions import CORRUPTIONS, SEVERITIES, Corruption
from pipelines.robustness.perturbations import PERTURBATIONS, Perturbation


@dataclass(frozen=True, kw_only=True)
class Robustness:
    """Corruptions and perturbations that a checkpoint is evaluated under."""

    corruptions: tuple[Corruption, ...] | None = None
    """Corruptions of ImageNet-C: all 15 where none is named."""
    severities: tuple[int, ...] = SEVERITIES
    corruption_jpeg: int = 0
    """Store corrupted images as JPEGs of this quality, 85 as published; 0 does not."""
    perturbations: tuple[Perturbation, ...] | None = None
    """Sequences of ImageNet-P: all 10 where none is named."""
    num_frames: int = 0
    """Frames of a sequence; 0 is as published, 31, and 41 of translate."""
    flip_reference: str = ""
    """Result of another checkpoint, by --json, whose flips are 100 %."""
    corruption_seed: int = 0
    plot: str = ""
    """PNG, SVG or PDF that errors and flips are drawn into."""

    def __post_init__(self) -> None:
        severities, num_frames = self.severities, self.num_frames
        if not severities or not set(severities) <= set(SEVERITIES):
            raise ValueError(
                f"expected severities from 1 to 5, got {severities}; set --severities"
            )
        if num_frames < 0 or num_frames == 1:
            raise ValueError(
                "expected at least 2 frames, or 0 for as many as published, got "
                f"{num_frames}; set --num-frames"
            )
        if not 0 <= self.corruption_jpeg <= 95:
            raise ValueError(
                "expected a JPEG quality from 1 to 95, or 0 for none, got "
                f"{self.corruption_jpeg}; set --corruption-jpeg"
            )
        if self.plot and not self.is_wanted:
            raise ValueError(
                "expected something to draw, got --plot alone; set --corruptions or "
                "--perturbations"
            )

    @property
    def is_wanted(self) -> bool:
        """Whether anything is to be measured."""
        return self.corruptions is not None or self.perturbations is not None

    def check(self) -> None:
        """Raise ValueError, before the work begins, if a package or file is missing."""
        check_plot(self.plot)
        needed = ["scipy"] if self.is_wanted else []
        if self.corruptions is not None and "frost" in (
            self.corruptions or CORRUPTIONS
        ):
            needed.append("torch_uncertainty_assets")
        for module in needed:
            if importlib.util.find_spec(module) is None:
                raise ValueError(
                    f"expected the package {module.replace('_', '-')}, got an "
                    "environment without it; install the extra 'robustness'"
                )
        self.reference_flips()

    def reference_flips(self) -> dict[Perturbation, float] | None:
        """Read the reference's flip probabilities; None if none is wanted.

        Raises ValueError where its file lacks a perturbation, or has one without a
        flip.
        """
        path = self.flip_reference
        if not path or self.perturbations is None:
            return None
        try:
            flips = json.loads(Path(path).read_text())["perturbations"]["flips"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"expected a result of sovit-eval --perturbations --json, got {path!r} "
                f"({type(error).__name__}); set --flip-reference"
            ) from None
        chosen = self.perturbations or PERTURBATIONS
        missing = [name for name in chosen if not flips.get(name)]
        if missing:
            raise ValueError(
                f"expected flips of every perturbation, got {path!r} without any of "
                f"{', '.join(missing)}; measure them or name others"
            )
        return flips


Flat = tyro.conf.OmitArgPrefixes[Robustness]
"""The same, its flags without a prefix."""
