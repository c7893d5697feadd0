"""Train a head on precomputed tokens as one trial."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from ray import tune

from pipelines.storage.path import StoragePath
from tuning.trials.ledger import Sweep, TrialRecord
from tuning.trials.options import Search
from tuning.trials.trial import TrialContext, bad_end, number_of, setting_of, tell_again

HEAD_METRIC = "head/top1"
TOKENS = "tokens"


def run_head_trial(
    config: Mapping[str, Any], *, known: TrialContext, tokens: str, num_epochs: int
) -> None:
    """Train the head of one setting, or replay its earlier reports.

    Args:
        tokens: Folder of the token sets.
    """
    number = number_of(config)
    if number in known.told:
        tell_again(known.told[number])
        return
    # Only where they are needed: torch costs every process seconds.
    import torch

    from pipelines.config.overrides import change_fields
    from pipelines.config.serialization import from_json
    from tuning.heads.feature_set import TokenSet
    from tuning.heads.train import train_head

    run = from_json(known.run)
    if not run.scale.use_gpu:
        torch.set_num_threads(1)
    folder = StoragePath(tokens)
    try:
        train_head(
            change_fields(run, setting_of(config)),
            tokens=TokenSet.open(folder.within("train")),
            val=TokenSet.open(folder.within("val")),
            num_epochs=num_epochs,
            seed=run.seed,
            on_epoch=tune.report,
        )
    except ValueError as error:
        tune.report(bad_end(error, metrics=(HEAD_METRIC,)))


def promoted(heads: list[TrialRecord], *, search: Search) -> list[TrialRecord]:
    """Select the heads' settings to train in full.

    The best, and optionally further ones spread evenly over the other ranks.
    """
    values = {
        entry.number: entry.last(HEAD_METRIC)
        for entry in heads
        if entry.status == "finished"
    }
    ranks = sorted(values, key=lambda number: (-(values[number] or 0.0), number))
    best, others = ranks[: search.num_promoted], ranks[search.num_promoted :]
    chosen = best + (spread(others, num=search.num_spread) if search.num_spread else [])
    return [entry for entry in heads if entry.number in chosen]


def rank_pairs(
    heads: list[TrialRecord], trained: list[TrialRecord], *, sweep: Sweep
) -> tuple[list[float], list[float], list[int]]:
    """Pair the heads' results with those of full training, with trial numbers."""
    metric = sweep.search.metric
    cheap = {entry.number: entry.last(HEAD_METRIC) for entry in heads}
    cheap_values, full_values, numbers = [], [], []
    for entry in trained:
        before, after = cheap.get(entry.number), entry.last(metric)
        if entry.status == "finished" and before is not None and after is not None:
            cheap_values.append(before)
            full_values.append(after)
            numbers.append(entry.number)
    return cheap_values, full_values, numbers


def spread(numbers: list[int], *, num: int) -> list[int]:
    """Pick `num` numbers spread evenly from the first to the last."""
    if num >= len(numbers):
        return list(numbers)
    places = np.linspace(0, len(numbers) - 1, num).round().astype(int)
    return [numbers[place] for place in dict.fromkeys(places.tolist())]
