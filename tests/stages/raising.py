"""A case that raises between two that do not."""

from __future__ import annotations

from benchmarks.on_gpu.setting import Figures, Setting, Task


def tasks(setting: Setting) -> list[Task]:
    """Three cases."""
    return [
        Task(name="first", measure=lambda: {"value": 1.0}),
        Task(name="second", measure=_fail),
        Task(name="third", measure=lambda: {"threads": setting.num_threads}),
    ]


def _fail() -> Figures:
    print("about to fail")
    raise ValueError("expected a figure\nand more")
