"""Stage with a case that raises between two that do not."""

from __future__ import annotations

from benchmarks.on_gpu.stages import Figures, Setting, Tasks


def tasks(setting: Setting) -> Tasks:
    """Return the three cases."""
    return {
        "first": lambda: {"value": 1.0},
        "second": _fail,
        "third": lambda: {"threads": setting.num_threads},
    }


def _fail() -> Figures:
    print("about to fail")
    raise ValueError("expected a figure\nand more")
