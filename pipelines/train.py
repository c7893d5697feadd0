"""Train a recipe: `sovit-train RECIPE [--typed.overrides]`.

    sovit-train demo
    sovit-train imagenet.so_vit_14 --data.train /shards/train --scale.num-workers 8
    sovit-train --resume NAME

A new run gets a new name; `--resume` goes on with a run that did not finish, from its
last checkpoint and with its own configuration. With a recipe, `--resume NAME` begins
the run where there is none of that name, so the same command may be given again and
again. SIGTERM is answered with a checkpoint and an end.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import logging
import os
import shutil
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from ray.train import UserCallback

from pipelines import tracking
from pipelines.alone import train_alone
from pipelines.cli import parse, run_command
from pipelines.config import Run
from pipelines.credentials import without_credentials
from pipelines.ending import noted_sigterm
from pipelines.errors import InterruptedRun, RunFailedError, StoppedEarly
from pipelines.ingest.stream import Plans
from pipelines.job import Job, Trained
from pipelines.keeping import log_model, log_shards, open_tracking
from pipelines.preflight import CheckedRun, check_run, with_absolute_paths
from pipelines.ray_trainer import train_on_ray
from pipelines.recipe import load_recipe
from pipelines.runfile import flat_params
from pipelines.runs import (
    Record,
    check_name,
    find_record,
    new_record,
    read_record,
    write_record,
)
from pipelines.session import ray_session
from pipelines.telling.bad_images import FILE, BadImageLog
from pipelines.telling.gauges import Gauges
from pipelines.telling.listener import Listener
from pipelines.telling.progress import Display

logger = logging.getLogger(__name__)
_PROG = "sovit-train"


def fit(
    run: Run,
    *,
    name: str,
    record: Record | None = None,
    callbacks: Sequence[UserCallback] = (),
    tracking_uri: str = "",
    tags: Mapping[str, str] = MappingProxyType({}),
    keep_model: bool = True,
    ends_on_sigterm: bool = True,
) -> Trained:
    """Train a run to its end, on Ray's workers or in this process.

    Args:
        name: The new run's name, or that of the one to go on with.
        record: The record of the run to go on with; None starts a new run.
        callbacks: Ray Train callbacks, such as Tune's. One that raises StoppedEarly in
            this process ends the run as one that has finished.
        tracking_uri: MLflow's address; by default that of the storage, or the
            environment's.
        tags: Further tags of the MLflow run.
        keep_model: Whether the final model goes to MLflow; its checkpoint stays anyway.
        ends_on_sigterm: Whether SIGTERM is answered with a checkpoint and
            InterruptedRun. Ray's own processes leave it to Ray.

    Raises ValueError for what the user can mend, before or while it trains, and
    RunFailedError where workers failed more often than the run allows. The MLflow run
    is marked FAILED with the reason.
    """
    run = with_absolute_paths(run)
    if record is None:
        check_name(run.storage, name=name)
    checked = check_run(run)
    logger.info("run %s: %s", name, checked.summary)
    uri = tracking_uri or tracking.default_uri(run.storage)
    here = contextlib.nullcontext()
    with here if run.scale.is_alone else ray_session(run.scale):
        # Only now: a run that there is no room for leaves nothing behind.
        is_begun = record is not None
        record = dataclasses.replace(record or new_record(run, name=name), run=run)
        job = _begun(record, checked=checked, uri=uri, tags=tags, is_begun=is_begun)
        run_id = job.mlflow_run_id
        record = dataclasses.replace(record, mlflow_run_id=run_id)
        write_record(record)
        try:
            train = train_alone if run.scale.is_alone else train_on_ray
            with noted_sigterm(is_wanted=ends_on_sigterm) as is_over:
                listener = _listener(job, name=name, is_over=is_over)
                trained = train(job, name=name, callbacks=callbacks, listener=listener)
            if is_over.is_set() and not _is_complete(trained, run=run):
                raise InterruptedRun(f"{_PROG}: ended; go on with --resume {name}")
            if keep_model:
                log_model(trained, job=job)
        except (ValueError, RunFailedError) as error:
            tracking.end_run(uri, run_id, status="FAILED", reason=str(error))
            raise
        except StoppedEarly:
            tracking.end_run(uri, run_id, status="FINISHED")
            raise
        except (KeyboardInterrupt, SystemExit):  # Ray Train answers Ctrl-C with these
            tracking.end_run(uri, run_id, status="KILLED", reason="interrupted")
            raise
        except Exception as error:
            tracking.end_run(uri, run_id, status="FAILED", reason=repr(error))
            raise
    tracking.end_run(uri, run_id, status="FINISHED")
    write_record(dataclasses.replace(record, status="finished"))
    return trained


def _begun(
    record: Record,
    *,
    checked: CheckedRun,
    uri: str,
    tags: Mapping[str, str],
    is_begun: bool,
) -> Job:
    """Open a run in MLflow with its shard sets, and describe it to the workers."""
    run_id = open_tracking(
        record,
        uri=uri,
        num_params=checked.num_params,
        tags=tags,
        is_begun=is_begun,
    )
    train_shards, val_shards = checked.train_shards, checked.val_shards
    for context, shards in (("train", train_shards), ("val", val_shards)):
        log_shards(shards, uri=uri, run_id=run_id, context=context)
    return Job(
        run=record.run,
        train_shards=train_shards,
        val_shards=val_shards,
        tracking_uri=uri,
        mlflow_run_id=run_id,
    )


def _is_complete(trained: Trained, *, run: Run) -> bool:
    return trained.metrics.get("epoch") == run.optim.total_epochs


def _listener(job: Job, *, name: str, is_over: threading.Event) -> Listener:
    """Make what hears the workers: progress, MLflow, and on Ray the gauges."""
    return Listener(
        display=_display(job),
        writer=tracking.MetricWriter(job.tracking_uri, job.mlflow_run_id),
        figures=tracking.FigureWriter(job.tracking_uri, job.mlflow_run_id),
        is_over=is_over,
        gauges=None if job.run.scale.is_alone else Gauges(name),
    )


def _display(job: Job) -> Display:
    """Make what shows a run's progress, and names its bad images in MLflow."""
    uri, run_id = job.tracking_uri, job.mlflow_run_id
    plans = Plans(shards=job.train_shards, run=job.run, train=True)
    num_epochs = job.run.optim.total_epochs
    bad_images = BadImageLog(
        keep=lambda text: tracking.log_text(uri, run_id, text=text, path=FILE),
        before=tracking.read_text(uri, run_id, path=FILE),
    )
    return Display(
        num_steps=plans.shape(0).num_batches * num_epochs,
        num_epochs=num_epochs,
        bad_images=bad_images,
    )


def main() -> None:
    """Run the command line."""
    run_command(_main, prog=_PROG)


def _main(arguments: Sequence[str]) -> None:
    recipe = ""
    if arguments and not arguments[0].startswith("-"):
        recipe, *arguments = arguments
    parser = argparse.ArgumentParser(_PROG, add_help=False, allow_abbrev=False)
    for option in ("--name", "--resume", "--storage"):
        parser.add_argument(option, default="")
    chosen, rest = parser.parse_known_args(arguments)
    if chosen.storage:
        rest += ["--storage", chosen.storage]
    record = None
    if chosen.resume:
        record = _record(chosen.resume, storage=chosen.storage, recipe=recipe)
    if record is None and not recipe and "--help" not in rest and "-h" not in rest:
        raise ValueError(
            "wanted a recipe, such as demo or imagenet.so_vit_14, or --resume NAME; "
            "came neither"
        )
    default = record.run if record else load_recipe(recipe or "demo")
    run = parse(Run, default=default, arguments=rest, prog=_PROG, text=__doc__)
    if record is not None:
        _check_same(record.run, run)
    name = chosen.resume or chosen.name or _new_name(run)
    start_s = time.monotonic()
    trained = fit(run, name=name, record=record)
    _print_summary(trained, run=run, seconds=time.monotonic() - start_s)


def _record(name: str, *, storage: str, recipe: str) -> Record | None:
    """Find a run to go on with; None where its recipe is to begin it."""
    storage = storage or (load_recipe(recipe).storage if recipe else "runs")
    if recipe and find_record(storage, name=name) is None:
        return None
    return read_record(storage, name=name)


def _check_same(before: Run, now: Run) -> None:
    """Refuse to go on with other settings than those that change nothing learnt."""
    free = {"log_every_steps", "num_checkpoints_to_keep", "storage", "key_log"}
    free |= {"checkpoint_every_steps", "checkpoint_every_minutes"}
    was, params = flat_params(before), flat_params(now)
    changed = [
        name
        for name in sorted(params.keys() | was.keys())
        if params.get(name) != was.get(name)
        and name not in free
        and not name.startswith(("scale.", "probe."))
    ]
    if changed:
        raise ValueError(
            f"wanted the settings that the run began with, came others for "
            f"{', '.join(changed)}; leave them out, or start a new run"
        )
    if before.scale.is_alone != now.scale.is_alone:
        raise ValueError(
            "scale.num_workers: wanted 0 again for a run that began so, and at least "
            f"1 for one that did not, came {now.scale.num_workers} after "
            f"{before.scale.num_workers}; leave it out, or start a new run"
        )


def _new_name(run: Run) -> str:
    return f"{run.recipe}-{time.strftime('%Y%m%d-%H%M%S')}"


def _print_summary(trained: Trained, *, run: Run, seconds: float) -> None:
    metrics, folder = trained.metrics, trained.checkpoint
    uri = tracking.default_uri(with_absolute_paths(run).storage)
    print(
        f"trained {run.model.name} in {seconds:.0f} s: "
        f"held-out top-1 {metrics.get('val/top1', float('nan')):.2f} % of "
        f"{metrics.get('val/num_images', 0):,.0f} images"
    )
    if folder is not None:
        val = without_credentials(run.data.val)
        print(f"checkpoint  {folder}")
        print(f"evaluate    {_installed('sovit-eval')} {folder} {val}")
    address = without_credentials(uri)
    is_server = address.startswith("http")
    ui = f"{_installed('mlflow')} ui --backend-store-uri {address}"
    print(f"compare     {address if is_server else ui}")


def _installed(command: str) -> str:
    """Give a command as it can be typed here, with its folder if it is on no path."""
    beside = Path(sys.executable).with_name(command)
    return command if shutil.which(command) else os.path.relpath(beside)


if __name__ == "__main__":
    main()
