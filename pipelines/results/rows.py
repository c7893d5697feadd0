"""Group runs that differ only in their seed into one row, and find what differs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import stdev
from typing import Literal, NamedTuple

from pipelines.config import NOT_LEARNT, NOT_LEARNT_GROUPS
from pipelines.config.overrides import short_tail
from pipelines.tracking.query import MetricPoint, StoredRun
from pipelines.tracking.sweeps import NUM_PARAMS, OUTCOME_TAG

PUBLISHED = "published_top1"
SEED = "seed"
_NUM_WORKERS = "scale.num_workers"
_SECONDS_PER_HOUR = 3600
# Where a run is stored, and how often it logs.
_KEEPING = NOT_LEARNT | {
    "experiment",
    "scale.max_failures",
    "scale.start_timeout_s",
    "scale.hang_timeout_s",
}
_HAVE_COLUMNS = frozenset({NUM_PARAMS, PUBLISHED})

Mode = Literal["max", "min"]


@dataclass(frozen=True, kw_only=True)
class ComparedRun:
    """A run with the metric histories that are compared."""

    run: StoredRun
    curve: tuple[MetricPoint, ...]
    """The metric that runs are compared by."""
    losses: tuple[MetricPoint, ...]
    rates: tuple[MetricPoint, ...]
    """Images per second."""
    epochs: tuple[MetricPoint, ...]

    @property
    def state(self) -> str:
        """How the run ended, or `running`."""
        return self.run.tags.get(OUTCOME_TAG) or self.run.status.lower()

    @property
    def num_epochs(self) -> float:
        """Completed epochs."""
        return self.epochs[-1].value if self.epochs else 0

    @property
    def num_epochs_planned(self) -> int:
        """Planned epochs; 0 if unknown."""
        names = ("optim.num_epochs", "optim.cooldown_epochs")
        return int(sum(self.param(name) or 0 for name in names))

    def hours(self) -> float | None:
        """Return the hours from the start to the end, or to the last logged value."""
        last = [points[-1].time_s for points in (self.rates, self.epochs) if points]
        end_s = self.run.end_s or max(last, default=None)
        if end_s is None or end_s <= self.run.start_s:  # written down afterwards
            return None
        return (end_s - self.run.start_s) / _SECONDS_PER_HOUR

    def device_hours(self) -> float | None:
        """Return the hours times the run's last number of workers."""
        hours = self.hours()
        again = _number(self.run.tags.get(f"resumed.{_NUM_WORKERS}"))
        num_workers = int(again or self.param(_NUM_WORKERS) or 1)
        return None if hours is None else hours * num_workers

    def images_per_s(self) -> float | None:
        """Return the mean training rate, without the first value if there are more."""
        rates = [point.value for point in self.rates]
        found = Spread.of(rates[1:] or rates)
        return found.mean if found else None

    def final(self) -> float | None:
        """Return the last value of the metric."""
        return self.curve[-1].value if self.curve else None

    def loss(self) -> float | None:
        """Return the last loss on the held-out images."""
        return self.losses[-1].value if self.losses else None

    def above_published(self) -> float | None:
        """Return the final value minus the published one."""
        final, published = self.final(), self.param(PUBLISHED)
        return None if final is None or published is None else final - published

    def epoch_at(self, step: int) -> float | None:
        """Return the epochs completed at a step; None before the first one."""
        if not self.epochs or not self.epochs[-1].step:
            return None
        return step * self.epochs[-1].value / self.epochs[-1].step

    def best(self, mode: Mode) -> MetricPoint | None:
        """Return the first of the best points, without NaNs."""
        points = [point for point in self.curve if point.value == point.value]
        sign = 1 if mode == "max" else -1
        return max(points, key=lambda point: sign * point.value, default=None)

    def param(self, name: str) -> float | None:
        """Parse a param as a number; None if it is none."""
        return _number(self.run.params.get(name))


@dataclass(frozen=True, kw_only=True)
class Spread:
    """A mean and the sample deviation, None for a single value."""

    mean: float
    deviation: float | None = None

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Spread | None:
        """Average the values that aren't None; None if there are none."""
        numbers = [value for value in values if value is not None]
        if not numbers:
            return None
        deviation = None
        if len(numbers) > 1:
            # A run that diverged has no number, which `stdev` would not take.
            are_finite = all(map(math.isfinite, numbers))
            deviation = stdev(numbers) if are_finite else math.nan
        return cls(mean=sum(numbers) / len(numbers), deviation=deviation)


class CurvePoint(NamedTuple):
    """Mean and deviation over a row's runs, 0 for one, at an epoch."""

    epoch: float
    mean: float
    deviation: float


@dataclass(frozen=True, kw_only=True)
class Row:
    """The runs of one configuration and one outcome."""

    runs: tuple[ComparedRun, ...]

    @property
    def name(self) -> str:
        """The first run's name, and the number of further runs."""
        more = len(self.runs) - 1
        return self.runs[0].run.name + (f" +{more}" if more else "")

    @property
    def state(self) -> str:
        """How the runs ended."""
        return self.runs[0].state

    def spread(self, value: Callable[[ComparedRun], float | None]) -> Spread | None:
        """Average a value over the runs that have it."""
        return Spread.of(map(value, self.runs))

    def param(self, name: str) -> str | None:
        """Return a param as it was logged; None if no run has it."""
        values = dict.fromkeys(
            run.run.params[name] for run in self.runs if name in run.run.params
        )
        return ", ".join(values) if values else None

    @property
    def run_ids(self) -> list[str]:
        """MLflow's ids of the runs."""
        return [run.run.run_id for run in self.runs]

    def mean_curve(self) -> list[CurvePoint]:
        """Average the metric at each step that every run with values has."""
        runs = [run for run in self.runs if run.curve and run.epochs]
        if not runs:
            return []
        curves = [{point.step: point.value for point in run.curve} for run in runs]
        points: list[CurvePoint] = []
        for step in sorted(set.intersection(*map(set, curves))):
            epoch = runs[0].epoch_at(step)
            found = Spread.of(curve[step] for curve in curves)
            if epoch is not None and found is not None:
                points.append(CurvePoint(epoch, found.mean, found.deviation or 0.0))
        return points


def group(runs: Sequence[ComparedRun], *, each: bool = False) -> list[Row]:
    """Group runs with the same training settings and outcome; `each` keeps each alone.

    A run that was stopped is not averaged with one that was trained to its end.
    """
    if each:
        return [Row(runs=(run,)) for run in runs]
    found: dict[object, list[ComparedRun]] = {}
    for run in runs:
        learnt = {
            name: value
            for name, value in run.run.params.items()
            if name not in _KEEPING | _HAVE_COLUMNS | {SEED}
            and not name.startswith(NOT_LEARNT_GROUPS)
        }
        found.setdefault((frozenset(learnt.items()), run.state), []).append(run)
    return [
        Row(runs=tuple(sorted(alike, key=lambda run: run.run.start_s)))
        for alike in found.values()
    ]


def differences(rows: Sequence[Row], *, each: bool = False) -> dict[str, str]:
    """Map the params that differ between rows to short names.

    Params with different values come first, then those that only some rows have, such
    as all of a pooling's.
    """
    params = sorted(
        {name for row in rows for run in row.runs for name in run.run.params}
    )
    hidden = _KEEPING | _HAVE_COLUMNS | (set() if each else {SEED})
    values = {
        name: {row.param(name) for row in rows} for name in params if name not in hidden
    }
    differing = [name for name, of_name in values.items() if len(of_name) > 1]
    differing.sort(key=lambda name: len(values[name] - {None}) < 2)
    return {name: short_name(name, among=params) for name in differing}


def short_name(name: str, *, among: Iterable[str]) -> str:
    """Shorten a dotted name to the last parts that distinguish it from the others.

    A model's name keeps its `model.`, since rows have names of their own.
    """
    return short_tail(name, among=among, taken=("name", "train", "val"))


def pareto(
    points: Mapping[int, tuple[float, float]],
    *,
    more_is_better: tuple[bool, bool],
) -> list[int]:
    """Return the Pareto-optimal points, sorted by their first coordinate.

    Of equal points the first is taken.
    """
    sign_x, sign_y = (1 if more else -1 for more in more_is_better)
    # From the best x on, a point is on the front where its y is the best so far.
    ordered = sorted(
        points, key=lambda key: (-sign_x * points[key][0], -sign_y * points[key][1])
    )
    front: list[int] = []
    for key in ordered:
        if not front or sign_y * (points[key][1] - points[front[-1]][1]) > 0:
            front.append(key)
    return sorted(front, key=lambda key: points[key][0])


def _number(text: str | None) -> float | None:
    try:
        return float(text) if text else None
    except ValueError:
        return None
