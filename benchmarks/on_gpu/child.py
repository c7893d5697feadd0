"""Measure one stage's cases in its process, and tell of each as it ends."""

from __future__ import annotations

import importlib
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.on_gpu.setting import Setting, Task

_MAX_ERROR = 300


def serve(module: str, setting: Setting, pipe: Connection, log: Path) -> None:
    """Measure the tasks of a stage's module; what is printed goes to `log`."""
    os.setsid()  # so that all that it starts can be ended with it
    with log.open("w") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # pyright: ignore
    threading.Thread(target=_end_with_runner, args=(pipe,), daemon=True).start()
    # What one stage compiles the next ones find.
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(setting.work / "inductor")
    measure_all(importlib.import_module(module).tasks(setting), pipe=pipe)


def measure_all(tasks: Sequence[Task], *, pipe: Connection) -> None:
    """Measure all cases; one that fails is told, and the next begins."""
    pipe.send({"cases": [task.name for task in tasks]})
    for task in tasks:
        start_s = time.perf_counter()
        told: dict[str, Any] = {"case": task.name}
        try:
            told["figures"] = dict(task.measure())
        except Exception as error:
            traceback.print_exc()
            line = str(error).strip().partition("\n")[0]
            told["error"] = f"{type(error).__name__}: {line}"[:_MAX_ERROR]
        pipe.send({**told, "seconds": time.perf_counter() - start_s})


def _end_with_runner(pipe: Connection) -> None:
    """End this process and those it started when the runner ends, however it does."""
    try:
        pipe.recv()
    except (EOFError, OSError):
        os.killpg(0, signal.SIGKILL)
