"""Read runs back from MLflow, without creating or changing a store.

Unlike what a training does with MLflow, reading fails clearly: with a ValueError of one
line where the store is away or has no such run.
"""

from __future__ import annotations

import difflib
import logging
import math
import re
import sqlite3
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple
from urllib.parse import quote

from pipelines.storage.redaction import error_summary, without_credentials
from pipelines.tracking.client import (
    ADDRESS_VARIABLE,
    PATIENCE,
    connect,
    environment,
    sqlite_path,
)
from pipelines.tracking.sweeps import KIND_TAG, PARENT_TAG, SWEEP_KIND

logger = logging.getLogger(__name__)

EXPERIMENT_PREFIX = "experiment:"
_SQLITE = "sqlite:///"
_RUN_ID = re.compile(r"[0-9a-f]{4,32}")
_NUM_ID_CHARS = 32
# Whole tables of runs and long histories, once the store has answered at all.
_READING = MappingProxyType({**PATIENCE, "MLFLOW_HTTP_REQUEST_TIMEOUT": "60"})
_NUM_PER_PAGE = 500
_NUM_SUGGESTED = 5


class MetricPoint(NamedTuple):
    """One value of a metric, with the step and the time of its logging."""

    step: int
    value: float
    time_s: float


@dataclass(frozen=True, kw_only=True)
class StoredRun:
    """A run as MLflow stores it, without its metric histories."""

    run_id: str
    name: str
    status: str
    """RUNNING, FINISHED, FAILED, KILLED or SCHEDULED."""
    params: Mapping[str, str]
    tags: Mapping[str, str]
    metrics: Mapping[str, float]
    """The last value of each."""
    start_s: float
    end_s: float | None
    """Seconds since 1970; None while it runs."""


class RunStore:
    """Read-only access to the runs of one MLflow store.

    Opening one, and each method, raises ValueError where the store does not answer.
    """

    def __init__(self, uri: str) -> None:
        self._place = without_credentials(uri)
        _check_there(uri)
        with self._clearly(PATIENCE):
            self._client = connect(uri, create=False)
            self._client.search_experiments(max_results=1)

    def find(self, names: Sequence[str]) -> list[StoredRun]:
        """Resolve names to runs, each run once, in the names' order.

        A name is a run's name, its id or the first four characters of it or more, the
        name of a sweep (which gives its trials), or `experiment:NAME` (all its runs).
        Of runs with one name the newest is taken, and a warning names the others.

        Raises ValueError where a name finds nothing, or an id's beginning several.
        """
        found: dict[str, StoredRun] = {}
        with self._clearly(_READING):
            for name in names:
                found |= {run.run_id: run for run in self._of(name)}
        return list(found.values())

    def history(self, run_id: str, *, metric: str) -> tuple[MetricPoint, ...]:
        """Read a metric by increasing step, without what restarts repeated.

        A run that resumed from a checkpoint repeats some steps: what it had measured
        beyond that checkpoint is left out. Empty where the run has no such metric.
        """
        with self._clearly(_READING):
            points = self._client.get_metric_history(run_id, metric)
        return last_life(
            MetricPoint(point.step, _value(point.value), point.timestamp / 1000)
            for point in points
        )

    def finished(self) -> list[StoredRun]:
        """List all runs that have finished."""
        with self._clearly(_READING):
            return self._search("attributes.status = 'FINISHED'")

    def _of(self, name: str) -> list[StoredRun]:
        if name.startswith(EXPERIMENT_PREFIX):
            return self._of_experiment(name.removeprefix(EXPERIMENT_PREFIX))
        run = self._one(name)
        trials = self._search(f"tags.`{PARENT_TAG}` = '{run.run_id}'")
        if not trials and _is_sweep(run):
            raise ValueError(
                f"expected trials of the sweep {name!r}, got none; its first trial has "
                "not begun yet"
            )
        return trials or [run]

    def _of_experiment(self, name: str) -> list[StoredRun]:
        experiment = self._client.get_experiment_by_name(name)
        if experiment is None:
            there = [each.name for each in self._client.search_experiments()]
            raise ValueError(
                f"expected an experiment of MLflow at {self._place}, got "
                f"{name!r}{_suggestion(name, there=there)}"
            )
        if experiment.lifecycle_stage != "active":
            raise ValueError(
                f"expected an experiment, got {name!r}, which is deleted; restore it "
                f"with mlflow experiments restore -x {experiment.experiment_id}"
            )
        runs = self._search(experiment_ids=[experiment.experiment_id])
        if runs := [run for run in runs if not _is_sweep(run)]:
            return runs
        raise ValueError(f"expected runs of the experiment {name!r}, got none")

    def _one(self, name: str) -> StoredRun:
        """Find a run by its name, its id or an id's prefix."""
        if named := self._named(name):
            *others, run = named
            if others:
                ids = ", ".join(each.run_id[:8] for each in reversed(others))
                logger.warning(
                    "%d runs are named %r: the newest, %s, is taken; ids name the "
                    "others: %s",
                    len(named),
                    name,
                    run.run_id[:8],
                    ids,
                )
            return run
        if _RUN_ID.fullmatch(name):
            runs = self._search(f"attributes.run_id LIKE '{name}%'")
            if len(runs) == 1:
                return runs[0]
            if runs:
                ids = ", ".join(f"{run.run_id} ({run.name})" for run in runs)
                raise ValueError(f"expected one run, got {name!r} of {ids}")
            if len(name) == _NUM_ID_CHARS:
                self._check_not_deleted(name)
        raise ValueError(
            f"expected a run or a sweep of MLflow at {self._place}, got "
            f"{name!r}{_suggestion(name, there=[run.name for run in self._search()])}"
        )

    def _named(self, name: str) -> list[StoredRun]:
        """List the runs of a name, the newest last."""
        # MLflow's filters have no escape for a quote within quotes.
        mark = '"' if "'" in name else "'"
        if mark in name or "\\" in name:
            return [run for run in self._search() if run.name == name]
        return self._search(f"attributes.run_name = {mark}{name}{mark}")

    def _check_not_deleted(self, run_id: str) -> None:
        try:
            stage = self._client.get_run(run_id).info.lifecycle_stage
        except Exception:  # it was never there, which the caller says
            return
        if stage != "active":
            raise ValueError(
                f"expected a run, got {run_id}, which is deleted; restore it with "
                f"mlflow runs restore --run-id {run_id}"
            )

    def _search(
        self, wanted: str = "", *, experiment_ids: list[str] | None = None
    ) -> list[StoredRun]:
        """List matching runs that are not deleted, the newest last."""
        if experiment_ids is None:
            experiment_ids = self._experiment_ids()
        runs: list[StoredRun] = []
        token = None
        while True:
            page = self._client.search_runs(
                experiment_ids,
                filter_string=wanted,
                max_results=_NUM_PER_PAGE,
                page_token=token,
            )
            for found in page:
                info, data = found.info, found.data
                runs.append(
                    StoredRun(
                        run_id=info.run_id,
                        name=info.run_name or info.run_id,
                        status=info.status,
                        params=dict(data.params),
                        tags=dict(data.tags),
                        metrics={
                            key: _value(value) for key, value in data.metrics.items()
                        },
                        start_s=info.start_time / 1000,
                        end_s=info.end_time / 1000 if info.end_time else None,
                    )
                )
            token = page.token
            if not token:
                return sorted(runs, key=lambda run: run.start_s)

    def _experiment_ids(self) -> list[str]:
        ids: list[str] = []
        token = None
        while True:
            page = self._client.search_experiments(page_token=token)
            ids += [experiment.experiment_id for experiment in page]
            token = page.token
            if not token:
                return ids

    @contextmanager
    def _clearly(self, settings: Mapping[str, str]) -> Iterator[None]:
        """Convert a client library's exceptions into one-line errors."""
        try:
            with environment(settings):
                yield
        except ValueError:
            raise
        except Exception as error:
            raise ValueError(
                f"expected an answer of MLflow at {self._place}, got "
                f"{error_summary(error)}; start it, or name another with --store"
            ) from error


def last_life(points: Iterable[MetricPoint]) -> tuple[MetricPoint, ...]:
    """Order points by step, dropping those that a restart repeated."""
    kept: list[MetricPoint] = []
    for point in sorted(points, key=lambda point: (point.time_s, point.step)):
        while kept and kept[-1].step >= point.step:
            kept.pop()
        kept.append(point)
    return tuple(kept)


def _value(value: float) -> float:
    # MLflow's databases have no infinity and keep the largest number for it.
    return math.copysign(math.inf, value) if abs(value) >= sys.float_info.max else value


def _is_sweep(run: StoredRun) -> bool:
    return run.tags.get(KIND_TAG) == SWEEP_KIND


def _suggestion(name: str, *, there: Sequence[str]) -> str:
    """Suggest similar names, or else the newest."""
    if not there:
        return "; nothing is kept there yet"
    like = difflib.get_close_matches(name, there, n=_NUM_SUGGESTED)
    newest = list(dict.fromkeys(reversed(there)))[:_NUM_SUGGESTED]
    return f"; there are {', '.join(like or newest)}"


def _check_there(uri: str) -> None:
    """Reject a missing store or one without tables, which MLflow would create."""
    if "://" not in uri:
        raise ValueError(
            f"expected the address of an MLflow store, got {uri!r}; write "
            f"{_SQLITE}FILE or http://HOST:PORT"
        )
    remedy = (
        f"name a store with --storage FOLDER, --store ADDRESS or {ADDRESS_VARIABLE}"
    )
    if uri.startswith("file://") and not Path(uri.removeprefix("file://")).is_dir():
        raise ValueError(f"expected an MLflow store, got {uri}, no folder; {remedy}")
    if not uri.startswith(_SQLITE):
        return
    path = sqlite_path(uri)
    assert path is not None
    if not path.is_file():
        raise ValueError(f"expected an MLflow store, got {path}, no file; {remedy}")
    try:
        address = f"file:{quote(str(path))}?mode=ro"
        with closing(sqlite3.connect(address, uri=True)) as connection:
            connection.execute("SELECT 1 FROM experiments LIMIT 1")
    except sqlite3.Error as error:
        raise ValueError(
            f"expected an MLflow store, got {path} ({error}); {remedy}"
        ) from error
