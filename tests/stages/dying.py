"""Stage whose process dies midway, with a child that would not."""

from __future__ import annotations

import os
import subprocess
import sys

from benchmarks.on_gpu.stages import Figures, Setting, Tasks

_SLEEP = "import time; time.sleep(600)"


def tasks(setting: Setting) -> Tasks:
    """Start a child, die, and define a case that is never reached."""

    def start() -> Figures:
        return {"child": subprocess.Popen([sys.executable, "-c", _SLEEP]).pid}

    def die() -> Figures:
        print("the last words", flush=True)
        os._exit(3)

    return {
        "start": start,
        "die": die,
        "never": dict,
    }
