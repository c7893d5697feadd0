"""Run the trials of one stage with Ray Tune: all heads, or all trainings."""

from __future__ import annotations

import functools
import logging
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import ray
from ray import tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch
from ray.util import remove_placement_group
from ray.util.placement_group import PlacementGroup
from ray.util.state import list_actors, list_placement_groups

from pipelines.driver.cluster import ask_dashboard
from pipelines.storage.redaction import error_summary
from pipelines.storage.retry import answering, is_remote
from pipelines.tracking import environment
from tuning.budget import Budget
from tuning.spaces import Space, choices_of
from tuning.trials.ledger import Ledger, StageName, Sweep
from tuning.trials.options import Search
from tuning.trials.trial import EPOCH, LISTED, NUMBER, SETTING, config_of, number_of
from tuning.watch import TrialRecorder

logger = logging.getLogger(__name__)

# The workers and readers have their own; Tune's process only waits.
TRIAL_RESOURCES = MappingProxyType({"CPU": 0.01})
_QUIET = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    # Ctrl-C ends the sweep at once: what is known is written down already.
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
}
_FREE_TIMEOUT_S = 60.0
_POLL_S = 1.0
_MOST_LISTED = 10_000


class NumberedOptuna(OptunaSearch):
    """Optuna searcher that numbers settings in the order they are drawn."""

    _num_drawn = 0

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        """Draw a setting, with its number."""
        config = super().suggest(trial_id)
        if not config:
            return config
        number, self._num_drawn = self._num_drawn, self._num_drawn + 1
        return {**config, NUMBER: number}


def run_stage(
    ledger: Ledger,
    *,
    trainable: Callable[[Mapping[str, Any]], None],
    watch: TrialRecorder,
    scheduler: TrialScheduler,
    searcher: Searcher | None = None,
    space: Space | None = None,
    num_concurrent: int,
    resources: Mapping[str, float] = TRIAL_RESOURCES,
    num_devices: float,
    reuse_actors: bool = False,
) -> None:
    """Run a ledger's trials, or those that a searcher draws.

    Args:
        trainable: Replays the reports of a trial that has already ended.
        num_devices: GPUs, or workers where there is none, that a trial holds.

    Trials that have not ended when the budget is used up stay as they are.
    """
    sweep, search = ledger.sweep, ledger.sweep.search
    folder = sweep.folder.within(f"tune-{ledger.stage}")
    filesystem, path = sweep.folder.open()
    listed = tune.grid_search(
        [config_of(entry.number, entry.setting) for entry in ledger.entries]
    )
    searched = {SETTING: space} if searcher else {LISTED: listed}
    budget = Budget(
        search.max_gpu_hours,
        spent=lambda: watch.device_hours(num_devices=num_devices),
    )
    with answering():
        folder.delete_folder()
    with _quiet():
        tune.Tuner(
            tune.with_resources(trainable, dict(resources)),
            param_space=searched,
            tune_config=tune.TuneConfig(
                search_alg=searcher,
                scheduler=scheduler,
                num_samples=search.num_trials if searcher else 1,
                max_concurrent_trials=num_concurrent,
                trial_name_creator=functools.partial(
                    _name_trial, sweep=sweep, stage=ledger.stage
                ),
                trial_dirname_creator=str,
                reuse_actors=reuse_actors,
            ),
            run_config=tune.RunConfig(
                name=f"tune-{ledger.stage}",
                storage_path=path,
                storage_filesystem=(
                    filesystem if is_remote(sweep.run.storage) else None
                ),
                stop=budget,
                callbacks=[watch],
                failure_config=tune.FailureConfig(max_failures=search.num_retries),
                verbose=0,
            ),
        ).fit()
    with answering():
        folder.delete_folder()  # our ledger holds what a sweep needs to go on


def _name_trial(trial: Trial, *, sweep: Sweep, stage: StageName) -> str:
    return sweep.trial_name(number_of(trial.config), stage=stage)


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress Tune's own tables and advice in the terminal."""
    tune_logger = logging.getLogger("ray.tune")
    before = tune_logger.level
    tune_logger.setLevel(logging.ERROR)
    try:
        with environment(_QUIET), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        tune_logger.setLevel(before)


def scheduler_of(search: Search, *, num_epochs: int) -> TrialScheduler:
    """Build the scheduler; ValueError where epochs are too few to compare."""
    if search.scheduler == "none":
        return FIFOScheduler()
    if num_epochs <= search.grace_epochs:
        raise ValueError(
            f"expected more than {search.grace_epochs} epochs for asha to stop trials "
            f"before their end, got {num_epochs}; raise --optim.num-epochs, lower "
            "--grace-epochs, or set --scheduler none"
        )
    return ASHAScheduler(
        time_attr=EPOCH,
        metric=search.metric,
        mode=search.modes[0],
        grace_period=search.grace_epochs,
        # Nobody is stopped at its last epoch, while it finishes.
        max_t=num_epochs - 1,
        reduction_factor=search.reduction_factor,
        stop_last_trials=False,
    )


def optuna_of(space: Space, ledger: Ledger) -> tuple[Searcher, Space]:
    """Build Optuna's TPE, which starts with the settings in the ledger."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    search = ledger.sweep.search
    several = len(search.metrics) > 1
    searcher = NumberedOptuna(
        metric=list(search.metrics) if several else search.metric,
        mode=list(search.modes) if several else search.modes[0],
        points_to_evaluate=[
            {f"{SETTING}/{name}": value for name, value in entry.setting.items()}
            for entry in ledger.entries
        ],
        # Drawing begins anew: the same seed would give what is there already.
        seed=search.sample_seed + len(ledger.entries),
    )
    domains = {
        name: tune.choice(values) if (values := choices_of(domain)) else domain
        for name, domain in space.items()
    }
    return searcher, domains


def check_state_api() -> None:
    """Raise ValueError where Ray's state API doesn't answer.

    Ray Train frees a stopped trial's resources once it knows that the trial is dead;
    without an answer the next trials would wait forever.
    """
    try:
        ask_dashboard()
    except Exception as error:  # LookupError, requests' and Ray's own
        raise ValueError(
            "expected a Ray whose dashboard answers, which a sweep needs to free what "
            f"stopped trials held, got {error_summary(error)}; start Ray with "
            "include_dashboard=True, and install ray[default]"
        ) from error


def wait_until_free(before: set[str]) -> None:
    """Wait until the stopped trials' actors have ended; remove what they leave held.

    Ray Train's cleaner misses the placement group of a controller that dies while it
    starts its workers, and Ray keeps that for as long as the sweep's driver lives.

    Args:
        before: Ids of the actors and placement groups that there were before.
    """
    deadline_s = time.monotonic() + _FREE_TIMEOUT_S
    while left := live_actors() - before:
        if time.monotonic() > deadline_s:
            logger.warning("%d actors of stopped trials still run", len(left))
            return
        time.sleep(_POLL_S)
    for group in placement_groups() - before:
        remove_placement_group(PlacementGroup(ray.PlacementGroupID.from_hex(group)))


def live_actors() -> set[str]:
    """List this job's actors but detached ones, which no trial's end takes along."""
    found: list[Any] = list_actors(
        address=ray.get_runtime_context().gcs_address,
        filters=[("job_id", "=", _job()), ("state", "!=", "DEAD")],
        limit=_MOST_LISTED,
        detail=True,
    )
    return {actor.actor_id for actor in found if not actor.is_detached}


def placement_groups() -> set[str]:
    """List this job's placement groups that hold, or wait for, resources."""
    found: list[Any] = list_placement_groups(
        address=ray.get_runtime_context().gcs_address,
        filters=[("creator_job_id", "=", _job()), ("state", "!=", "REMOVED")],
        limit=_MOST_LISTED,
        detail=True,
    )
    return {group.placement_group_id for group in found}


def _job() -> str:
    return ray.get_runtime_context().get_job_id()
