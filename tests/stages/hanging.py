"""Stage with a case that never ends."""

from __future__ import annotations

import time

from benchmarks.on_gpu.stages import Figures, Setting, Tasks


def tasks(setting: Setting) -> Tasks:
    """Return a case that ends, and one that does not."""
    return {
        "quick": lambda: {"value": 2},
        "endless": _sleep,
    }


def _sleep() -> Figures:
    print("waiting for ever", flush=True)
    time.sleep(600)
    return {}
