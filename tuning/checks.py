"""Validate a sweep before any of it is written."""

from __future__ import annotations

import logging
import re

from pipelines.checkpoints.run_record import check_name
from pipelines.config import Run
from pipelines.driver.preflight import check_run
from pipelines.storage.path import StoragePath
from pipelines.storage.retry import answering
from tuning.trials.options import Search

logger = logging.getLogger(__name__)
_NUM_SHOWN = 3


def check_sweep(run: Run, *, search: Search) -> None:
    """Raise ValueError for a run that can't be searched, and as `check_run`."""
    if few_tokens := check_run(run).few_tokens:
        logger.warning(few_tokens)
    if not run.validation.held_out:
        raise ValueError(
            "expected a held-out set by which trials are compared, got "
            "--validation.no-held-out; leave it out"
        )
    if run.validation.asynchronous or run.validation.every_epochs > 1:
        raise ValueError(
            "expected trials that are evaluated after each epoch, by which they are "
            "compared, got --validation.asynchronous or --validation.every-epochs; "
            "leave them out"
        )
    if search.head_from and run.optim.class_weights != "none":
        raise ValueError(
            "expected heads on tokens to be tried by the loss of the trainings, got "
            "--optim.class-weights, which heads don't have; leave it or --head-from out"
        )
    if search.head_from and run.data.balance:
        raise ValueError(
            "expected heads on tokens, which come once an epoch, got --data.balance; "
            "leave it or --head-from out"
        )
    if run.max_hours:
        raise ValueError(
            "expected trials that train to their end, got --max-hours; limit the sweep "
            "by --max-gpu-hours"
        )
    if search.method == "optuna" and search.head_from:
        raise ValueError(
            "expected settings that are known before the heads are tried, got --method "
            "optuna; take random or grid, or leave out --head-from"
        )


def check_sweep_name(storage: str, *, name: str) -> None:
    """Raise ValueError where a new sweep's name, or that of a trial, is taken.

    A sweep's folder may be gone and its trials there: they are another sweep's.
    """
    check_name(storage, name=name)
    trial = re.compile(rf"{re.escape(name)}-\d{{4,}}")
    try:
        with answering():
            names = [entry.base_name for entry in StoragePath(storage).entries()]
    except FileNotFoundError:
        return
    if taken := [other for other in names if trial.fullmatch(other)]:
        shown = ", ".join(taken[:_NUM_SHOWN])
        raise ValueError(
            f"expected a new name for this sweep, got {name!r}, of which "
            f"{str(StoragePath(storage))!r} holds {len(taken)} trials of another sweep "
            f"({shown}{', ...' if len(taken) > _NUM_SHOWN else ''}); choose another "
            "--name, or move them away"
        )
