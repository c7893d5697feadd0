"""Importance of a sweep's fields, and rank correlation of cheap and full training.

Optuna and SciPy are imported where they are used.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tuning.report.table import compared, values_of
from tuning.trials.ledger import Sweep, TrialRecord

if TYPE_CHECKING:
    from optuna import Study
    from optuna.distributions import BaseDistribution

MIN_TRIALS = 4
"""Fewer tell nothing about importances."""
MIN_PAIRS = 3
"""Fewer tell nothing about ranks."""
_LOG = "loguniform"


def common_epoch(sweep: Sweep, entries: Sequence[TrialRecord]) -> int:
    """Find the last epoch in which every trial that did not end badly has a value.

    Trials without any value don't count. 0 where there is no such epoch.
    """
    metric = sweep.search.metric
    epochs = [set(values_of(one, metric)) for one in compared(sweep.search, entries)]
    return max(set.intersection(*epochs), default=0) if epochs else 0


def importances(
    sweep: Sweep, entries: Sequence[TrialRecord]
) -> tuple[int, dict[str, float]]:
    """Compute the share of the first metric's variance by field: fANOVA.

    Values of one epoch are compared, so that stopped trials count like the others. A
    field of a log-uniform domain is taken by its logarithm.

    Returns:
        The epoch, and the importances by fields, the greatest first; they sum to 1, but
        for rounding. None where the trials are fewer than four or all equal.
    """
    metric = sweep.search.metric
    epoch = common_epoch(sweep, entries)
    found = [one for one in compared(sweep.search, entries) if epoch]
    targets = [values_of(one, metric)[epoch] for one in found]
    varied = {field for field in sweep.domains if len(set(_column(field, found))) > 1}
    if len(found) < MIN_TRIALS or len(set(targets)) < 2 or not varied:
        return epoch, {}
    with quiet_optuna():
        from optuna.importance import FanovaImportanceEvaluator, get_param_importances

        found_shares = get_param_importances(
            study_of(sweep, found, values=targets),
            evaluator=FanovaImportanceEvaluator(seed=0),
        )
    shares = {field: float(share) for field, share in found_shares.items()}
    return epoch, shares | {
        field: 0.0 for field in sweep.domains if field not in varied
    }


def study_of(
    sweep: Sweep, entries: Sequence[TrialRecord], *, values: Sequence[float]
) -> Study:
    """Rebuild an Optuna study from trials, with a value for each.

    A field of a log-uniform domain is log-scaled; one with a non-numeric value
    is categorical.
    """
    import optuna

    direction = "maximize" if sweep.search.sign == 1 else "minimize"
    study = optuna.create_study(direction=direction)
    columns = {field: _column(field, entries) for field in sweep.domains}
    kinds = {
        field: _distribution(column, is_log=sweep.domains[field].startswith(_LOG))
        for field, column in columns.items()
        if column
    }
    for at, value in enumerate(values):
        params = {field: column[at] for field, column in columns.items()}
        study.add_trial(
            optuna.trial.create_trial(params=params, distributions=kinds, value=value)
        )
    return study


def _column(field: str, entries: Sequence[TrialRecord]) -> list[Any]:
    """Return a field's values; all as strings where one is not a number."""
    values = [entry.setting.get(field) for entry in entries]
    are_numbers = all(type(value) in (int, float) for value in values)
    return values if are_numbers else [str(value) for value in values]


def _distribution(values: Sequence[Any], *, is_log: bool) -> BaseDistribution:
    from optuna.distributions import (
        CategoricalDistribution,
        FloatDistribution,
        IntDistribution,
    )

    if any(isinstance(value, str) for value in values):
        return CategoricalDistribution(sorted(set(values)))
    is_log = is_log and min(values) > 0
    if all(isinstance(value, int) for value in values):
        return IntDistribution(min(values), max(values), log=is_log)
    return FloatDistribution(min(values), max(values), log=is_log)


@contextmanager
def quiet_optuna() -> Iterator[None]:
    """Silence Optuna's log of studies and its experimental warnings."""
    import optuna

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # experimental plots, axes of one value
            yield
    finally:
        optuna.logging.set_verbosity(before)


def rank_correlation(
    cheap: Sequence[float], full: Sequence[float]
) -> tuple[float, float]:
    """Compute Spearman's and Kendall's coefficients of two lists of the same trials.

    Pairs with a value that is not finite are left out. NaN for fewer than three pairs,
    and where all values of a list are equal.
    """
    pairs = [
        pair for pair in zip(cheap, full, strict=True) if all(map(math.isfinite, pair))
    ]
    left, right = [one for one, _ in pairs], [one for _, one in pairs]
    if len(pairs) < MIN_PAIRS or min(len(set(left)), len(set(right))) < 2:
        return math.nan, math.nan
    from scipy.stats import kendalltau, spearmanr

    results: list[Any] = [spearmanr(left, right), kendalltau(left, right)]
    spearman, kendall = (float(result.statistic) for result in results)
    return spearman, kendall
