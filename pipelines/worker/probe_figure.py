"""Store and plot the results of probes: no torch, since the driver draws."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_INCHES = (7.0, 6.0)
_DOTS_PER_INCH = 110


@dataclass(frozen=True, kw_only=True)
class Band:
    """Range of one step's probe over all step sizes."""

    step: int
    loss: float
    """Loss of the batch itself."""
    loss_min: float
    loss_max: float
    gradient_change_min: float
    gradient_change_max: float

    @property
    def metrics(self) -> dict[str, float]:
        """Values by the names they are logged under."""
        names = ("loss_min", "loss_max", "gradient_change_min", "gradient_change_max")
        return {f"probe/{name}": getattr(self, name) for name in names}


def draw_bands(bands: Sequence[Band], path: Path, *, title: str) -> None:
    """Plot the bands over the steps as a PNG, like the study's figures."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=_INCHES, layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    steps = [band.step for band in bands]
    figure.suptitle(title)
    upper.fill_between(
        steps,
        [band.loss_min for band in bands],
        [band.loss_max for band in bands],
        alpha=0.4,
    )
    upper.plot(steps, [band.loss for band in bands], marker=".")
    upper.set_ylabel("loss, and its band")
    lower.fill_between(
        steps,
        [band.gradient_change_min for band in bands],
        [band.gradient_change_max for band in bands],
        alpha=0.4,
    )
    lower.set_ylabel("gradient change")
    lower.set_xlabel("step")
    figure.savefig(path, dpi=_DOTS_PER_INCH, format="png")
