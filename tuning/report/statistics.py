"""Say which fields mattered in a sweep, and how well a cheap ranking foretold another.

Optuna and SciPy are imported where they are used.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tuning.entries import Entry, Sweep
from tuning.report.table import compared, values_of

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

MIN_TRIALS = 4
"""Fewer tell nothing about importances."""
MIN_PAIRS = 3
"""Fewer tell nothing about ranks."""
_LOG = "loguniform"


def is_log(domain: str) -> bool:
    """Tell whether a domain, in words, is drawn by its logarithm."""
    return domain.startswith(_LOG)


def common_epoch(sweep: Sweep, entries: Sequence[Entry]) -> int:
    """Find the last epoch in which all trials that did not end badly have a value.

    Trials without any value don't count. 0 where there is no such epoch.
    """
    metric = sweep.search.metric
    epochs = [set(values_of(one, metric)) for one in compared(sweep.search, entries)]
    return max(set.intersection(*epochs), default=0) if epochs else 0


def importances(sweep: Sweep, entries: Sequence[Entry]) -> tuple[int, dict[str, float]]:
    """Give the share of the first metric's variance that each field explains: fANOVA.

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
    columns: dict[str, list[Any]] = {}
    for field, domain in sweep.domains.items():
        values = [one.setting.get(field) for one in found]
        columns[field] = _as_numbers(values, takes_log=is_log(domain))
    varied = {field: one for field, one in columns.items() if len(set(one)) > 1}
    if len(found) < MIN_TRIALS or len(set(targets)) < 2 or not varied:
        return epoch, {}
    shares = _fanova(varied, targets)
    fixed = {field: 0.0 for field in columns if field not in varied}
    return epoch, shares | fixed


def _as_numbers(values: Sequence[Any], *, takes_log: bool) -> list[Any]:
    """Keep numbers; make words of a column that holds anything else."""
    if not all(type(value) in (int, float) for value in values):
        return [str(value) for value in values]
    if takes_log:
        return [math.log(value) for value in values]
    return list(values)


def _fanova(
    columns: Mapping[str, Sequence[Any]], targets: Sequence[float]
) -> dict[str, float]:
    with _quiet_optuna():
        import optuna
        from optuna.importance import FanovaImportanceEvaluator

        study = optuna.create_study()
        kinds = {field: _distribution(values) for field, values in columns.items()}
        for at, target in enumerate(targets):
            trial = optuna.trial.create_trial(
                params={field: values[at] for field, values in columns.items()},
                distributions=kinds,
                value=target,
            )
            study.add_trial(trial)
        evaluator = FanovaImportanceEvaluator(seed=0)
        shares = optuna.importance.get_param_importances(study, evaluator=evaluator)
    return {field: float(share) for field, share in shares.items()}


def _distribution(values: Sequence[Any]) -> BaseDistribution:
    from optuna.distributions import (
        CategoricalDistribution,
        FloatDistribution,
        IntDistribution,
    )

    if any(isinstance(value, str) for value in values):
        return CategoricalDistribution(sorted(set(values)))
    if all(isinstance(value, int) for value in values):
        return IntDistribution(min(values), max(values))
    return FloatDistribution(min(values), max(values))


@contextmanager
def _quiet_optuna() -> Iterator[None]:
    """Keep Optuna from announcing a study, and leave its log as it was."""
    import optuna

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)


def rank_correlation(
    cheap: Sequence[float], full: Sequence[float]
) -> tuple[float, float]:
    """Give Spearman's and Kendall's coefficients of two lists of the same trials.

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
