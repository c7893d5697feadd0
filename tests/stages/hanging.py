"""A case that never ends."""

from __future__ import annotations

import time

from benchmarks.on_gpu.setting import Figures, Setting, Task


def tasks(setting: Setting) -> list[Task]:
    """One that ends, one that does not."""
    return [
        Task(name="quick", measure=lambda: {"value": 2}),
        Task(name="endless", measure=_sleep),
    ]


def _sleep() -> Figures:
    print("waiting for ever", flush=True)
    time.sleep(600)
    return {}
