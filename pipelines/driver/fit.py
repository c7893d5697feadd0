"""Train a run to its end: claim its folder, record it, launch it, record its end."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Literal

from ray.train import UserCallback

from pipelines import tracking
from pipelines.checkpoints.manifest import trust
from pipelines.checkpoints.run_record import (
    Record,
    delete_record,
    new_record,
    write_record,
)
from pipelines.config import Run
from pipelines.config.own_code import OwnCode
from pipelines.data.loader import Plans
from pipelines.driver.cluster import ray_session
from pipelines.driver.launch_local import train_alone
from pipelines.driver.launch_ray import train_on_ray
from pipelines.driver.mlflow_run import MlflowSink, log_model, log_shards, open_tracking
from pipelines.driver.preflight import (
    CheckedRun,
    check_start,
    resume_command,
    with_absolute_paths,
)
from pipelines.driver.progress import Display
from pipelines.driver.prometheus import Gauges
from pipelines.driver.signals import StopRequest, stop_requests
from pipelines.errors import InterruptedRun, RunFailedError, StoppedEarly
from pipelines.events.bad_images import FILE, BadImageLog
from pipelines.events.channel import WorkerStarted
from pipelines.hardware.facts import tags_of, without_bfloat16
from pipelines.storage.lease import claimed
from pipelines.storage.path import StoragePath
from pipelines.storage.redaction import without_credentials
from pipelines.tracking import LateRun
from pipelines.worker.job import Job, Trained

logger = logging.getLogger(__name__)
_TRIAL_PATIENCE_S = 60.0


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
    sweep_id: str = "",
    code: OwnCode | None = None,
) -> Trained:
    """Train a run to its end, on Ray's workers or in this process.

    Args:
        name: The name of the new run, or of the one to resume.
        record: The record of the run to resume; None starts a new run.
        callbacks: Ray Train callbacks, such as Tune's. One that raises StoppedEarly in
            this process ends the run as finished.
        tracking_uri: MLflow's address; by default that of the storage, or the
            environment's.
        tags: Further tags of the MLflow run.
        keep_model: Whether the best model and pictures of what it gets wrong go to
            MLflow; its checkpoint stays anyway.
        ends_on_sigterm: Whether SIGTERM, SIGHUP and Ctrl-C are answered with a
            checkpoint and InterruptedRun. Ray's own processes leave them to Ray.
        sweep_id: Id of the sweep that a new run is a trial of.
        code: The user's own recipe file of a new run; a resumed one has its own.

    Raises ValueError for user errors, before or during the training, and
    RunFailedError where workers failed more often than the run allows. The MLflow run
    is marked FAILED with the reason.
    """
    with stop_requests(is_wanted=ends_on_sigterm) as stop:
        run = with_absolute_paths(run)
        checked = check_start(run, name=name, record=record)
        _announce(checked, name=name)
        uri = tracking_uri or tracking.default_uri(run.storage)
        # A sweep has asked for MLflow: once its trials run, nothing of it stops them.
        if is_demanded := not sweep_id:
            tracking.check_usable(uri, experiment=run.experiment)
        folder, here = StoragePath(run.storage).within(name), contextlib.nullcontext()
        with (
            claimed(folder, patience_s=_TRIAL_PATIENCE_S if sweep_id else 0.0),
            here if run.scale.is_local else ray_session(run.scale),
        ):
            stop.arm()
            # Only now: a run that there is no room for leaves nothing behind. And
            # whole: between its folder and its id in MLflow no signal is answered.
            with stop.waiting():
                is_begun = record is not None
                if code and not is_begun:
                    trust(code)
                if record is None:
                    record = new_record(run, name=name, sweep_id=sweep_id, code=code)
                record = dataclasses.replace(record, run=run, digests=checked.digests)
                write_record(record)
                job, tracked = _begun(
                    record,
                    checked=checked,
                    uri=uri,
                    tags=tags,
                    is_begun=is_begun,
                    is_demanded=is_demanded,
                )
                job = dataclasses.replace(job, keeps_model=keep_model)
            with _ended_in_mlflow(job, tracked=tracked, name=name, stop=stop):
                trained = _trained(
                    job, tracked=tracked, name=name, callbacks=callbacks, stop=stop
                )
                if is_demanded:
                    _check_recorded(tracked, job=job, name=name)
                job = dataclasses.replace(job, mlflow_run_id=tracked.run_id)
                if keep_model:
                    log_model(trained, job=job)
            _finish(record, tracked=tracked, stop=stop)
    return trained


def _announce(checked: CheckedRun, *, name: str) -> None:
    """Log what was understood of a run before anything is started."""
    logger.info("run %s: %s", name, checked.summary)
    if checked.balance:
        logger.info(checked.balance)
    if checked.few_tokens:
        logger.warning(checked.few_tokens)


def _finish(record: Record, *, tracked: LateRun, stop: StopRequest) -> None:
    """Mark a run as finished in MLflow and in its record."""
    with stop.waiting():
        tracked.end(status="FINISHED")
        run_id = tracked.run_id or record.mlflow_run_id
        write_record(
            dataclasses.replace(record, mlflow_run_id=run_id, status="finished")
        )
    stop.finish()


def _trained(
    job: Job,
    *,
    tracked: LateRun,
    name: str,
    callbacks: Sequence[UserCallback],
    stop: StopRequest,
) -> Trained:
    """Train to the end; InterruptedRun where a signal ended it after a checkpoint."""
    stop.check()
    run = job.run
    train = train_alone if run.scale.is_local else train_on_ray
    folder = StoragePath(run.storage).within(name)
    with stop.noted() as is_over, stop.timed(run.max_hours):
        mlflow_sink = MlflowSink(
            tracked, uri=job.tracking_uri, folder=folder, should_stop=is_over
        )
        display = _display(job, tracked=tracked, stop=stop)
        # Ray exports the gauges.
        gauges = [] if run.scale.is_local else [Gauges(name)]
        with mlflow_sink, contextlib.closing(display):
            trained = train(
                job,
                name=name,
                callbacks=callbacks,
                sinks=[display, mlflow_sink, *gauges],
                should_stop=is_over,
            )
        is_whole = trained.metrics.get("epoch") == run.optim.total_epochs
        if is_over.is_set() and not is_whole:
            raise InterruptedRun(f"ended by {stop.name} after a checkpoint")
    return trained


@contextlib.contextmanager
def _ended_in_mlflow(
    job: Job, *, tracked: LateRun, name: str, stop: StopRequest
) -> Iterator[None]:
    """Set the MLflow run's status when a block ends early."""

    def end(status: Literal["FINISHED", "FAILED", "KILLED"], reason: str = "") -> None:
        with stop.waiting():
            tracked.end(status=status, reason=reason)

    go_on = f"go on with {resume_command(job.run, name=name)}"
    try:
        with stop.restored():
            yield
    except (ValueError, RunFailedError) as error:
        end("FAILED", str(error))
        raise
    except StoppedEarly:
        end("FINISHED")
        raise
    except KeyboardInterrupt as error:
        end("KILLED", "interrupted")
        raise KeyboardInterrupt(f"{error}; {go_on}".removeprefix("; ")) from error
    except SystemExit as error:
        end("KILLED", str(error))
        status = error.code if isinstance(error.code, int) else 1
        raise InterruptedRun(f"{error}; {go_on}", status=status) from error
    except Exception as error:
        end("FAILED", repr(error))
        raise


def _begun(
    record: Record,
    *,
    checked: CheckedRun,
    uri: str,
    tags: Mapping[str, str],
    is_begun: bool,
    is_demanded: bool,
) -> tuple[Job, LateRun]:
    """Open a run in MLflow with its shard sets, and build the workers' job.

    A new run that MLflow rejects leaves no folder.
    """
    try:
        tracked = open_tracking(
            record,
            uri=uri,
            num_params=checked.num_params,
            tags=tags,
            is_begun=is_begun,
            is_demanded=is_demanded,
        )
    except ValueError:
        if not is_begun:
            delete_record(record)
        raise

    train_shards, val_shards = checked.train_shards, checked.val_shards

    def log_sets(run_id: str) -> None:
        for context, shards in (("train", train_shards), ("val", val_shards)):
            if shards is not None:
                log_shards(shards, uri=uri, run_id=run_id, context=context)

    tracked.do(log_sets)
    job = Job(
        run=record.run,
        train_shards=train_shards,
        val_shards=val_shards,
        held_out=checked.held_out,
        class_counts=checked.class_counts,
        tracking_uri=uri,
        mlflow_run_id=tracked.run_id,
        code=record.code,
    )
    return job, tracked


def _check_recorded(tracked: LateRun, *, job: Job, name: str) -> None:
    """Raise RunFailedError if MLflow was unreachable during the whole training."""
    if not tracked.is_open:
        raise RunFailedError(
            f"{name} is trained, but MLflow at {without_credentials(job.tracking_uri)} "
            "has been away all along; see that it can be reached, then record it with "
            f"{resume_command(job.run, name=name)}"
        )


def _display(job: Job, *, tracked: LateRun, stop: StopRequest) -> Display:
    """Build the progress display; bad images and hardware go to MLflow."""
    uri = job.tracking_uri
    plans = Plans(shards=job.train_shards, run=job.run, train=True)
    num_epochs = job.run.optim.total_epochs
    bad_images = BadImageLog(
        keep=lambda text: tracked.do(
            lambda run_id: tracking.log_text(uri, run_id, text=text, path=FILE)
        ),
        before=tracking.read_text(uri, job.mlflow_run_id, path=FILE),
    )

    def note(begun: Sequence[WorkerStarted]) -> str:
        stop.begun.set()
        workers = [item.hardware for item in begun]
        tags = tags_of(workers)
        tracked.do(lambda run_id: tracking.tag_run(uri, run_id, tags=tags))
        return without_bfloat16(workers) if job.run.scale.amp == "auto" else ""

    return Display(
        num_steps=plans.shape(0).num_batches * num_epochs,
        num_epochs=num_epochs,
        bad_images=bad_images,
        on_begun=note,
    )
