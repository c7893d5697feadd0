"""Run stages one after the other, each within its time, and keep what they tell."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal

from benchmarks.on_gpu.child import serve
from benchmarks.on_gpu.setting import Setting
from benchmarks.on_gpu.stages import Stage

_NUM_LAST_LINES = 30
_MAX_LINE = 300
_LOOK_EVERY_S = 0.2
_TERM_S = 5.0
# A stage without at least so long is not begun.
_MIN_S = 5.0

State = Literal["waiting", "running", "done", "failed", "out of time", "left out"]


@dataclass(kw_only=True)
class Outcome:
    """What is known of a stage, so far."""

    state: State = "waiting"
    why: str = ""
    seconds: float = 0.0
    cases: dict[str, dict[str, Any]] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    """Of cases that failed."""
    missing: list[str] = field(default_factory=list)
    """Cases that were not measured."""
    last_lines: list[str] = field(default_factory=list)
    """Of what the stage printed, where something failed."""

    def hear(self, told: Mapping[str, Any]) -> None:
        """Note what a stage told: its cases' names, or one case's figures."""
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
        """Set the state of a stage that ended, or was ended at its limit."""
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
    """Run a stage in a process of its own, until it ends or its time does.

    Args:
        until_s: Reading of `time.monotonic` by which all stages have to end.
        outcome: Filled in as the stage tells.
        save: Is called after each change of it.
    """
    limit_s = min(stage.limit_s * setting.patience, until_s - time.monotonic())
    if lacks := stage.lacks:
        outcome.state, outcome.why = "left out", f"needs {', '.join(lacks)}"
    elif limit_s < min(_MIN_S, stage.limit_s):
        outcome.state, outcome.why = "left out", "no time was left"
    else:
        outcome.state = "running"
    save()
    if outcome.state == "left out":
        return
    start_s = time.monotonic()
    log = setting.work / f"{stage.name}.log"

    def hear(told: Mapping[str, Any]) -> None:
        outcome.hear(told)
        save()

    try:
        with _process(stage, setting=setting, log=log) as (process, pipe):
            is_ended = _hear(process, pipe, limit_s=limit_s, hear=hear)
            exit_code = process.exitcode if is_ended else None
        outcome.conclude(exit_code=exit_code, limit_s=limit_s)
    except (OSError, EOFError) as error:  # the process that stages fork off is gone
        outcome.state = "failed"
        outcome.why = f"its process did not start: {type(error).__name__}"
    outcome.seconds = time.monotonic() - start_s
    if outcome.state != "done":
        outcome.last_lines = last_lines(log)
    save()


def warm_up() -> float:
    """Import what the stages need, for their processes to fork off: seconds taken."""
    start_s = time.monotonic()
    process = _context().Process(target=os.getpid)
    process.start()
    process.join()
    return time.monotonic() - start_s


def _context() -> ForkServerContext:
    # Were CUDA asked what there is, no process that forks off could use it.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.on_gpu.warm"])
    return context


@contextlib.contextmanager
def _process(
    stage: Stage, *, setting: Setting, log: Path
) -> Iterator[tuple[BaseProcess, Connection]]:
    """Start a stage's process; at the end it and all of its group are ended."""
    context = _context()
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(stage.module, setting, theirs, log))
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


def _hear(
    process: BaseProcess,
    pipe: Connection,
    *,
    limit_s: float,
    hear: Callable[[Mapping[str, Any]], None],
) -> bool:
    """Hear a stage until its process has ended; False where its time ended first."""
    until_s = time.monotonic() + limit_s
    while time.monotonic() < until_s:
        try:
            if pipe.poll(_LOOK_EVERY_S):
                hear(pipe.recv())
                continue
        except (EOFError, ConnectionError):
            process.join(timeout=max(until_s - time.monotonic(), 0.0))
        if not process.is_alive():
            return True
    return False


def last_lines(log: Path) -> list[str]:
    """The last lines of a stage's output, long ones cut."""
    if not log.exists():
        return []
    lines = log.read_text(errors="replace").splitlines()[-_NUM_LAST_LINES:]
    return [line[:_MAX_LINE] for line in lines]
