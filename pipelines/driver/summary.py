"""Print a run's results at its end, and the commands to type next."""

from __future__ import annotations

from pipelines import tracking
from pipelines.cli.printed import command_line
from pipelines.config import Run
from pipelines.driver.preflight import with_absolute_paths
from pipelines.storage.redaction import without_credentials
from pipelines.training.model import title_of
from pipelines.worker.job import Trained


def print_summary(trained: Trained, *, run: Run, seconds: float) -> None:
    metrics, folder = trained.metrics, trained.checkpoint
    uri = tracking.default_uri(with_absolute_paths(run).storage)
    held_out = (
        f"held-out top-1 {metrics.get('val/top1', float('nan')):.2f} % of "
        f"{metrics.get('val/num_images', 0):,.0f} images"
    )
    if not run.validation.held_out:
        held_out = "nothing held out"
    print(f"trained {title_of(run.model)} in {seconds:.0f} s: {held_out}")
    if folder is not None:
        print(f"checkpoint  {folder}")
        if trained.best is not None and trained.best != folder:
            print(f"best        {trained.best}")
        val = run.data.val or "SHARDS"
        print(f"evaluate    {command_line('sovit-eval', folder, val)}")
    address = without_credentials(uri)
    is_server = address.startswith("http")
    ui = command_line("mlflow", "ui", "--backend-store-uri", address)
    print(f"compare     {address if is_server else ui}")
