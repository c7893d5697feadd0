"""Record and show the progress of trials: the driver's side of a stage."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from ray import tune
from ray.tune.experiment import Trial
from tqdm import tqdm

from tuning.trials.ledger import Ledger, TrialRecord
from tuning.trials.trial import EPOCH, OUTCOME, REASON, number_of, setting_of

_SECONDS_PER_HOUR = 3600
_DIED = "its process died"


class TrialRecorder(tune.Callback):
    """Callback of Tune that updates a stage's ledger and shows its progress.

    Args:
        metric: Metric shown for each trial.
        num_epochs: Epochs of a trial that is not stopped.
        on_end: Called once with each trial that has ended.
    """

    def __init__(
        self,
        ledger: Ledger,
        *,
        metric: str,
        num_epochs: int,
        num_trials: int,
        on_end: Callable[[TrialRecord], None],
    ) -> None:
        self._ledger, self._num_epochs, self._on_end = ledger, num_epochs, on_end
        self._metric = metric
        self._started_s: dict[int, float] = {}
        self._seconds_before: dict[int, float] = {}
        self._outcomes: dict[int, tuple[str, str]] = {}
        self._is_terminal = sys.stderr.isatty()
        num_ended = sum(entry.has_ended for entry in ledger.entries)
        self._bar = tqdm(
            total=num_trials,
            initial=num_ended,
            unit="trial",
            disable=not self._is_terminal,
        )

    def __getstate__(self) -> dict[str, Any]:
        """Return no state for Tune's snapshot: a resumed sweep doesn't use it."""
        return {}

    def device_hours(self, *, num_devices: float) -> float:
        """Sum the device hours of all trials, each with `num_devices`."""
        seconds = sum(
            self._seconds(entry.number)
            if entry.number in self._started_s
            else entry.seconds
            for entry in self._ledger.entries
        )
        return seconds * num_devices / _SECONDS_PER_HOUR

    def close(self) -> None:
        """Close the progress bar."""
        self._bar.close()

    def on_trial_start(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        """Record the start, or restart, of a trial."""
        number = number_of(trial.config)
        if number not in self._ledger:
            setting = setting_of(trial.config)
            self._ledger.put(TrialRecord(number=number, setting=setting))
        entry = self._ledger[number]
        if entry.has_ended:
            return
        self._started_s[number] = time.monotonic()
        self._seconds_before[number] = entry.seconds
        self._ledger.change(
            number, status="running", num_attempts=entry.num_attempts + 1, reason=""
        )

    def on_trial_result(
        self,
        iteration: int,
        trials: list[Trial],
        trial: Trial,
        result: Mapping[str, Any],
        **info: Any,
    ) -> None:
        """Record an epoch's report once."""
        number = number_of(trial.config)
        entry = self._ledger[number]
        if entry.has_ended:
            return
        if OUTCOME in result:
            self._outcomes[number] = (result[OUTCOME], result[REASON])
        elif result[EPOCH] > entry.epoch:
            report = _numbers(result)
            entry = self._ledger.change(
                number,
                reports=(*entry.reports, report),
                seconds=self._seconds(number),
            )
            self._show_epoch(entry)

    def on_trial_complete(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        """Record how a trial ended: its last epoch, the scheduler, or badly."""
        number = number_of(trial.config)
        is_whole = self._ledger[number].epoch >= self._num_epochs
        plain = ("finished" if is_whole else "stopped", "")
        self._end(number, *self._outcomes.pop(number, plain))

    def on_trial_error(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        """Record a trial that failed once too often."""
        number = number_of(trial.config)
        self._end(number, *self._outcomes.pop(number, ("failed", _DIED)))

    def on_trial_recover(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        """Record and show that a trial is retried."""
        number = number_of(trial.config)
        _, reason = self._outcomes.pop(number, ("failed", _DIED))
        self._ledger.change(number, seconds=self._seconds(number), reason=reason)
        self._say(f"trial {number} is tried again: {reason}")

    def _end(self, number: int, status: str, reason: str) -> None:
        if self._ledger[number].has_ended:
            return
        entry = self._ledger.change(
            number, status=status, reason=reason, seconds=self._seconds(number)
        )
        self._started_s.pop(number, None)
        self._on_end(entry)
        self._bar.update()
        self._say(_end_line(entry, metric=self._metric))

    def _seconds(self, number: int) -> float:
        since_s = time.monotonic() - self._started_s[number]
        return self._seconds_before[number] + since_s

    def _show_epoch(self, entry: TrialRecord) -> None:
        value = entry.last(self._metric)
        if value is None:
            return
        line = f"epoch {entry.epoch}/{self._num_epochs}"
        self._say(f"trial {entry.number}  {line}  {self._metric} {value:.4g}")

    def _say(self, line: str) -> None:
        if self._is_terminal:
            self._bar.write(line)
        else:
            print(line, flush=True)


def _numbers(result: Mapping[str, Any]) -> dict[str, float]:
    """Extract a worker's metrics from Tune's result."""
    return {
        name: float(value)
        for name, value in result.items()
        if ("/" in name or name == EPOCH)
        and not name.startswith("config/")
        and isinstance(value, int | float)
        and math.isfinite(value)
    }


def _end_line(entry: TrialRecord, *, metric: str) -> str:
    value = entry.last(metric)
    shown = f"  {metric} {value:.4g}" if value is not None else ""
    fields = "  ".join(
        f"{name.rpartition('.')[2]} {value}" for name, value in entry.setting.items()
    )
    why = f"  ({entry.reason})" if entry.reason else ""
    return f"trial {entry.number} {entry.status}{shown}  {fields}{why}"
