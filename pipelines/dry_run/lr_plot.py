"""Plot the learning rate over a run's epochs, as text or as a picture."""

from __future__ import annotations

import math
from pathlib import Path

from pipelines.config import Optim
from pipelines.training.optimizer import learning_rate

NUM_COLUMNS, NUM_ROWS = 72, 12
_BARS = " ▁▂▃▄▅▆▇█"
_PLAIN_BARS = "     ####"
_NUM_TICKS = 4
_LABEL_CHARS = 8
_NUM_POINTS = 2000
_INCHES = (7.0, 3.6)
_DOTS_PER_INCH = 110


def rates(optim: Optim, *, steps_per_epoch: int, num_points: int) -> list[float]:
    """Return the rates at the middles of `num_points` equal parts of a run."""
    num_steps = optim.total_epochs * steps_per_epoch
    steps = (int((at + 0.5) * num_steps / num_points) for at in range(num_points))
    return [
        learning_rate(step, optim=optim, steps_per_epoch=steps_per_epoch)
        for step in steps
    ]


def draw_text(optim: Optim, *, steps_per_epoch: int, is_plain: bool = False) -> str:
    """Draw the rate as bars of blocks, or of ASCII, over an axis of epochs.

    Any rate above 0 is visible.
    """
    found = rates(optim, steps_per_epoch=steps_per_epoch, num_points=NUM_COLUMNS)
    bars = _PLAIN_BARS if is_plain else _BARS
    num_levels = len(bars) - 1
    top = max(found)
    levels = [math.ceil(rate / top * NUM_ROWS * num_levels - 1e-6) for rate in found]
    labels = {0: f"{top:.2g}", NUM_ROWS // 2: f"{top / 2:.2g}"}
    lines = []
    for row in range(NUM_ROWS):
        below = (NUM_ROWS - 1 - row) * num_levels
        cells = (bars[min(max(level - below, 0), num_levels)] for level in levels)
        lines.append(f"{labels.get(row, ''):>{_LABEL_CHARS}} |{''.join(cells)}")
    lines.append(f"{'0':>{_LABEL_CHARS}} +{'-' * NUM_COLUMNS}")
    return "\n".join(line.rstrip() for line in [*lines, _ticks(optim.total_epochs)])


def _ticks(num_epochs: int) -> str:
    """Format an axis's tick labels: whole epochs at its ends, and some between."""
    start = _LABEL_CHARS + 2
    line = [" "] * (start + NUM_COLUMNS + _LABEL_CHARS)
    for tick in range(_NUM_TICKS + 1):
        epoch = num_epochs * tick // _NUM_TICKS
        place = start + NUM_COLUMNS * epoch // num_epochs
        text = str(epoch)
        first = place - len(text) // 2
        line[first : first + len(text)] = text
    return f"{''.join(line).rstrip()} epochs"


def draw_picture(optim: Optim, *, steps_per_epoch: int, title: str, path: Path) -> None:
    """Plot the rate as a PNG, SVG or PDF; raise ValueError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError(
            "plot: expected matplotlib to draw with, got an environment without; pip "
            "install matplotlib, or leave out --plot"
        ) from error
    num_points = min(optim.total_epochs * steps_per_epoch, _NUM_POINTS)
    found = rates(optim, steps_per_epoch=steps_per_epoch, num_points=num_points)
    epochs = [(at + 0.5) * optim.total_epochs / num_points for at in range(num_points)]
    figure = Figure(figsize=_INCHES, layout="constrained")
    axes = figure.subplots()
    axes.plot(epochs, found)
    axes.set(xlabel="epoch", ylabel="learning rate", title=title, ylim=(0, None))
    axes.margins(x=0)
    axes.grid(alpha=0.2)
    figure.savefig(path, dpi=_DOTS_PER_INCH)
