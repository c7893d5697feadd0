"""List what a run needs more of as it grows, and find the settings that need least."""

from __future__ import annotations

import dataclasses
import math

from benchmarks.scale.loads import Allowed, Limit
from benchmarks.scale.model import Case, Cluster, Costs, Shards
from benchmarks.scale.pauses import epoch_end, pauses
from benchmarks.scale.rates import BLOCKS_PER_READER, rates_and_rooms

_MORE_READERS = 1.25
_MAX_BATCHES_PER_UNIT = 16
_READ_AHEAD_SHARE = 0.8
_EVALUATED_EVERY = 10  # epochs: thirty points of a curve of 300


def limits_of(
    case: Case, *, cluster: Cluster, costs: Costs, allowed: Allowed
) -> list[Limit]:
    """Work out the load of every resource."""
    return [
        *rates_and_rooms(case, cluster=cluster, costs=costs),
        *pauses(case, cluster=cluster, costs=costs, allowed=allowed),
    ]


def advised(
    case: Case, *, shards: Shards, cluster: Cluster, costs: Costs, allowed: Allowed
) -> Case:
    """Set the readers, their read-ahead and the rows of a unit, on other shards.

    Of units of 1 to 16 batches, those whose first limit is least, and then the second;
    but none for which there is no room, where there is room for another. Evaluate every
    ten epochs where each epoch's end would take too long.
    """
    if epoch_end(case, costs=costs, allowed=allowed).load > 1:
        case = _rarely_evaluated(case)

    def worst(changed: Case) -> tuple[bool, list[float]]:
        limits = limits_of(changed, cluster=cluster, costs=costs, allowed=allowed)
        return not _has_room(limits), sorted((one.load for one in limits), reverse=True)

    changes = [
        _with_units(case, num_batches, shards=shards, cluster=cluster, costs=costs)
        for num_batches in range(1, _MAX_BATCHES_PER_UNIT + 1)
    ]
    return min(changes, key=worst)


def _has_room(limits: list[Limit]) -> bool:
    return all(limit.load <= 1 for limit in limits if limit.kind == "room")


def _with_units(
    case: Case, num_batches: int, *, shards: Shards, cluster: Cluster, costs: Costs
) -> Case:
    """Set a unit's rows, and what follows from them."""
    num_rows = num_batches * case.run.data.batch_size
    changed = _changed(
        dataclasses.replace(case, shards=shards), {"shuffle_rows": num_rows}
    )
    needed = math.ceil(_MORE_READERS * changed.readers_needed(costs, cluster))
    num_readers = max(needed, changed.run.data.num_readers)
    ahead_mb = num_readers * BLOCKS_PER_READER * changed.block_mb / _READ_AHEAD_SHARE
    ahead_mb = max(
        math.ceil(ahead_mb / changed.num_gpus), changed.run.data.read_ahead_mb
    )
    return _changed(changed, {"num_readers": num_readers, "read_ahead_mb": ahead_mb})


def _rarely_evaluated(case: Case) -> Case:
    num_epochs = max(case.run.validation.every_epochs, _EVALUATED_EVERY)
    validation = dataclasses.replace(case.run.validation, every_epochs=num_epochs)
    run = dataclasses.replace(case.run, validation=validation)
    return dataclasses.replace(case, run=run)


def _changed(case: Case, fields: dict[str, int]) -> Case:
    data = dataclasses.replace(case.run.data, **fields)
    return dataclasses.replace(case, run=dataclasses.replace(case.run, data=data))
