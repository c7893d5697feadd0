"""Run stages in turn, each within its time limit, and save their results."""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal

from benchmarks.on_gpu.stages import Setting, Stage, Tasks

_NUM_LAST_LINES = 30
_MAX_LINE = 300
_LOOK_EVERY_S = 0.2
_TERM_S = 5.0
# A stage without at least so long is not begun.
_MIN_S = 5.0
# What most stages need, imported once: their processes fork off one that has it.
# Nothing of it touches a GPU, so each process can.
_IMPORTED = ("torch", "timm", "pyarrow", "benchmarks.model_rounds")

State = Literal["waiting", "running", "done", "failed", "out of time", "left out"]


@dataclass(kw_only=True)
class Outcome:
    """A stage's outcome so far."""

    state: State = "waiting"
    why: str = ""
    seconds: float = 0.0
    cases: dict[str, dict[str, Any]] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    """Of cases that failed."""
    missing: list[str] = field(default_factory=list)
    """Cases that were not measured."""
    last_lines: list[str] = field(default_factory=list)
    """Of the stage's output, if something failed."""

    @property
    def is_whole(self) -> bool:
        """Whether the stage and all its cases have completed."""
        return self.state not in ("waiting", "running") and not self.missing

    @property
    def is_bad(self) -> bool:
        """Whether the stage ended badly."""
        return self.state in ("failed", "out of time")

    def note(self, told: Mapping[str, Any]) -> None:
        """Record a stage's message: its cases' names, or one case's figures."""
        if "cases" in told:
            self.missing = list(told["cases"])
            return
        name = told["case"]
        self.missing.remove(name)
        if "error" in told:
            self.errors[name] = told["error"]
        else:
            self.cases[name] = {**told["figures"], "seconds": told["seconds"]}

    def conclude(self, *, exit_code: int | None, limit_s: float) -> None:
        """Set the state of a stage that ended, or was killed at its limit."""
        is_whole = bool(self.cases or self.errors) and not self.missing
        if exit_code is None and not is_whole:
            self.state, self.why = "out of time", f"ended after {limit_s:.0f} s"
        elif exit_code and not is_whole:
            self.state, self.why = "failed", f"its process ended with {exit_code}"
        elif self.errors:
            self.state, self.why = "failed", f"cases that failed: {len(self.errors)}"
        else:
            self.state = "done"


def run_stage(
    stage: Stage,
    *,
    setting: Setting,
    until_s: float,
    outcome: Outcome,
    save: Callable[[], None],
) -> None:
    """Run a stage in its own process, until it ends or times out.

    Args:
        until_s: Reading of `time.monotonic` by which all stages have to end.
        outcome: Filled in as the stage reports.
        save: Called after each change of it.
    """
    start_s, log = time.monotonic(), setting.work / f"{stage.name}.log"
    limit_s = min(stage.limit_s * setting.patience, until_s - start_s)
    outcome.state = "left out"
    if lacks := stage.lacks:
        outcome.why = f"needs {', '.join(lacks)}"
    elif limit_s < min(_MIN_S, stage.limit_s):
        outcome.why = "no time was left"
    else:
        outcome.state = "running"
    save()
    if outcome.state == "left out":
        return
    try:
        with _process(stage, setting=setting, log=log) as (process, pipe):
            is_ended = False
            while not is_ended and time.monotonic() < start_s + limit_s:
                is_ended = _hear(process, pipe, outcome=outcome, save=save)
            exit_code = process.exitcode if is_ended else None
        outcome.conclude(exit_code=exit_code, limit_s=limit_s)
    except (OSError, EOFError) as error:  # the process that stages fork off is gone
        outcome.state = "failed"
        outcome.why = f"its process did not start: {type(error).__name__}"
    outcome.seconds = time.monotonic() - start_s
    if outcome.is_bad and log.exists():
        lines = log.read_text(errors="replace").splitlines()[-_NUM_LAST_LINES:]
        outcome.last_lines = [line[:_MAX_LINE] for line in lines]
    save()


def _hear(
    process: BaseProcess,
    pipe: Connection,
    *,
    outcome: Outcome,
    save: Callable[[], None],
) -> bool:
    """Receive a stage's next message; return whether its process has ended."""
    try:
        if pipe.poll(_LOOK_EVERY_S):
            outcome.note(pipe.recv())
            save()
            return False
    except (EOFError, ConnectionError):
        process.join(timeout=_LOOK_EVERY_S)
    return not process.is_alive()


def warm_up() -> float:
    """Preload the stages' imports in the fork server; return the seconds taken."""
    start_s = time.monotonic()
    process = _context().Process(target=os.getpid)
    process.start()
    process.join()
    return time.monotonic() - start_s


def _context() -> ForkServerContext:
    # Were CUDA asked what there is, no process that forks off could use it.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(_IMPORTED))
    return context


@contextlib.contextmanager
def _process(
    stage: Stage, *, setting: Setting, log: Path
) -> Iterator[tuple[BaseProcess, Connection]]:
    """Start a stage's process, and kill its process group at the end."""
    context = _context()
    ours, theirs = context.Pipe()
    module = f"{stage.package}.{stage.name}"
    process = context.Process(target=_serve, args=(module, setting, theirs, log))
    process.start()
    theirs.close()
    try:
        yield process, ours
    finally:
        assert process.pid is not None
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            process.join(timeout=_TERM_S)
        process.kill()  # where it had no group of its own yet
        ours.close()


def _serve(module: str, setting: Setting, pipe: Connection, log: Path) -> None:
    """Measure a stage's cases, in its process, with output in `log`."""
    os.setsid()  # so that all that it starts can be ended with it
    with log.open("w") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # pyright: ignore
    threading.Thread(target=_end_with_runner, args=(pipe,), daemon=True).start()
    # What one stage compiles the next ones find.
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(setting.work / "inductor")
    tasks: Tasks = importlib.import_module(module).tasks(setting)
    pipe.send({"cases": list(tasks)})
    for name, measure in tasks.items():
        start_s = time.perf_counter()
        told: dict[str, Any] = {"case": name}
        try:
            told["figures"] = dict(measure())
        except Exception as error:  # it is told, and the next begins
            traceback.print_exc()
            line = str(error).strip().partition("\n")[0]
            told["error"] = f"{type(error).__name__}: {line}"[:_MAX_LINE]
        pipe.send({**told, "seconds": time.perf_counter() - start_s})


def _end_with_runner(pipe: Connection) -> None:
    """Kill this process group when the runner ends, however it does."""
    try:
        pipe.recv()
    except (EOFError, OSError):
        os.killpg(0, signal.SIGKILL)
