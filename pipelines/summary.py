"""Say at a run's end what it came to, and what to type next."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from pipelines import tracking
from pipelines.config import Run
from pipelines.credentials import without_credentials
from pipelines.job import Trained
from pipelines.preflight import with_absolute_paths


def print_summary(trained: Trained, *, run: Run, seconds: float) -> None:
    metrics, folder = trained.metrics, trained.checkpoint
    uri = tracking.default_uri(with_absolute_paths(run).storage)
    held_out = (
        f"held-out top-1 {metrics.get('val/top1', float('nan')):.2f} % of "
        f"{metrics.get('val/num_images', 0):,.0f} images"
    )
    if not run.validation.held_out:
        held_out = "nothing held out"
    print(f"trained {run.model.name} in {seconds:.0f} s: {held_out}")
    if folder is not None:
        val = without_credentials(run.data.val)
        print(f"checkpoint  {folder}")
        if trained.best is not None and trained.best != folder:
            print(f"best        {trained.best}")
        val = val or "SHARDS"
        print(f"evaluate    {_installed('sovit-eval')} {folder} {val}")
    address = without_credentials(uri)
    is_server = address.startswith("http")
    ui = f"{_installed('mlflow')} ui --backend-store-uri {address}"
    print(f"compare     {address if is_server else ui}")


def _installed(command: str) -> str:
    """Give a command as it can be typed here, with its folder if it is on no path."""
    beside = Path(sys.executable).with_name(command)
    return command if shutil.which(command) else os.path.relpath(beside)
