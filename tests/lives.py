"""Start drivers to be killed, forked to save their import time."""

from __future__ import annotations

import functools
import importlib
import multiprocessing
import os
import signal
import sys
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from unittest import mock

from pipelines.driver.fit import fit
from pipelines.train import main
from tests.waiting import wait_for

# What a driver imports as it goes: one process does so, and all fork off it.
for name in (
    "mlflow.pyfunc",
    "mlflow.store.tracking.sqlalchemy_store",
    "pipelines.transforms.cpu",
    "recipes.demo",
    "tests.small_runs",
):
    importlib.import_module(name)


def begin(
    arguments: Sequence[str], *, log: Path, keeps_model: bool = False
) -> BaseProcess:
    """Start `sovit-train` in a process of its own, which writes into a log.

    It leads a session, by which all of its processes can be found, and ignores no
    signal, unlike what a shell starts in the background.
    """
    log.touch()  # A signal may end it before it writes.
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload([__name__])
    process = processes.Process(target=_live, args=(arguments, log, keeps_model))
    process.start()
    return process


def cut_at(step: int, *, process: BaseProcess, audit_log: Path, log: Path) -> None:
    """Kill a driver once it has been training on a step, whatever it does then."""
    wait_for(
        lambda: last_step(audit_log) >= step or not process.is_alive(),
        what=f"step {step}",
        log=log.read_text,
        every_s=0.001,
    )
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL, log.read_text()


def last_step(audit_log: Path) -> int:
    """Return the last step of the newest process; -1 before its first."""
    files = sorted(audit_log.glob("*.csv"))
    lines = files[-1].read_text().splitlines() if files else []
    return int(lines[-1].partition(",")[0]) if lines else -1


def _live(arguments: Sequence[str], log: Path, keeps_model: bool) -> None:
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    sys.argv = ["sovit-train", *arguments]
    # To keep the model in MLflow takes seconds.
    kept = functools.partial(fit, keep_model=keeps_model)
    with mock.patch("pipelines.train.fit", kept):
        main()
