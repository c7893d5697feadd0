"""Console scripts: each imports its command, and Ctrl-C meanwhile ends it quietly.

torch, Ray and timm take seconds to import, in which Python would answer Ctrl-C with a
traceback from somewhere within them.
"""

from __future__ import annotations

import importlib
import signal

MODULES = {
    "shards": "pipelines.shards.command",
    "train": "pipelines.train",
    "evaluate": "pipelines.evaluate",
    "export": "pipelines.export.command",
    "predict": "pipelines.predict",
    "preview": "pipelines.preview",
    "scoreboard": "pipelines.scoreboard.command",
    "tune": "tuning.search",
    "compare": "tuning.compare.command",
}


def _run(name: str) -> None:
    handler = signal.getsignal(signal.SIGINT)
    if handler == signal.default_int_handler:  # not where it is ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    command = importlib.import_module(MODULES[name])
    signal.signal(signal.SIGINT, handler)
    command.main()


def shards() -> None:
    """Run `sovit-shards`."""
    _run("shards")


def train() -> None:
    """Run `sovit-train`."""
    _run("train")


def evaluate() -> None:
    """Run `sovit-eval`."""
    _run("evaluate")


def export() -> None:
    """Run `sovit-export`."""
    _run("export")


def predict() -> None:
    """Run `sovit-predict`."""
    _run("predict")


def preview() -> None:
    """Run `sovit-preview`."""
    _run("preview")


def scoreboard() -> None:
    """Run `sovit-scoreboard`."""
    _run("scoreboard")


def tune() -> None:
    """Run `sovit-tune`."""
    _run("tune")


def compare() -> None:
    """Run `sovit-compare`."""
    _run("compare")
