"""Work out when GPUs stand still: checkpoints, an epoch's end, the start."""

from __future__ import annotations

import math

from benchmarks.scale.loads import Allowed, Limit
from benchmarks.scale.model import Case, Cluster, Costs, Shards

_NUM_HELD_OUT = 50_000
_FILES_PER_LISTING = 1000
_MB = 10**6


def pauses(
    case: Case, *, cluster: Cluster, costs: Costs, allowed: Allowed
) -> list[Limit]:
    """Work out all loads of this kind, and whether checkpoints are written in time."""
    return [
        epoch_end(case, costs=costs, allowed=allowed),
        _timed_checkpoints(case, costs=costs, allowed=allowed),
        _writing(case, cluster=cluster, costs=costs),
        _start(case, cluster=cluster, costs=costs, allowed=allowed),
    ]


def checkpoint_pause_s(costs: Costs) -> float:
    """Give the time in which all GPUs wait for a copy, and for the driver to hear."""
    return costs.kept.copy_s + costs.heard_s


def written_s(case: Case, *, cluster: Cluster, costs: Costs) -> float:
    """Give the time until a checkpoint is where it belongs, while training goes on."""
    return costs.kept.write_s + _transfer_s(case, cluster=cluster, costs=costs)


def _transfer_s(case: Case, *, cluster: Cluster, costs: Costs) -> float:
    """Give the time of a checkpoint's way into a bucket, or out of it."""
    return costs.kept.num_mb / cluster.stream_mb_s if case.in_bucket else 0.0


def evaluation_s(case: Case) -> float:
    """Give an epoch's share of an evaluation on all workers.

    It is as fast as training, and takes no second longer to begin: two passes forward,
    for the average and the raw weights, are less than one forward and back.
    """
    validation = case.run.validation
    if validation.beside:
        return 0.0
    return _NUM_HELD_OUT / case.images_per_s / validation.every_epochs


def epoch_end(case: Case, *, costs: Costs, allowed: Allowed) -> Limit:
    """Work out the pause of a checkpoint, and of an evaluation where one is due."""
    pause_s = checkpoint_pause_s(costs) + evaluation_s(case)
    return Limit(
        name="an epoch's end",
        kind="pause",
        load=pause_s / case.epoch_s / allowed.pause_share,
        needs=f"{pause_s:,.1f} s after {case.epoch_s:,.1f} s",
        has=f"{allowed.pause_share:.0%}",
        flags=("--validation.every-epochs", "--validation.beside"),
    )


def _timed_checkpoints(case: Case, *, costs: Costs, allowed: Allowed) -> Limit:
    pause_s = checkpoint_pause_s(costs)
    between_s = 60 * case.run.checkpoint_every_minutes
    share = pause_s / between_s if between_s else 0.0
    return Limit(
        name="checkpoints by time",
        kind="pause",
        load=share / allowed.pause_share,
        needs=f"{pause_s:,.1f} s in {between_s:,.0f} s",
        has=f"{allowed.pause_share:.0%}",
        flags=("--checkpoint-every-minutes",),
    )


def _writing(case: Case, *, cluster: Cluster, costs: Costs) -> Limit:
    # At an epoch's end training waits for the one before: that makes it a rate.
    needed_s = written_s(case, cluster=cluster, costs=costs)
    return Limit(
        name="writing checkpoints",
        kind="rate",
        load=needed_s / case.epoch_s,
        needs=f"{needed_s:,.1f} s beside training",
        has=f"{case.epoch_s:,.1f} s, an epoch's",
    )


def footers_s(
    shards: Shards, *, cluster: Cluster, costs: Costs, in_bucket: bool = True
) -> float:
    """Give the time in which the driver reads the footers of a set, and lists it."""
    here_s = shards.num_shards * costs.footer_ms / 1000
    if not in_bucket:
        return here_s
    slower = cluster.store_latency_ms / costs.bucket_latency_ms
    asked_s = shards.num_shards * costs.bucket_footer_ms * slower / 1000
    listed_s = (
        math.ceil(shards.num_shards / _FILES_PER_LISTING)
        * cluster.store_latency_ms
        / 1000
    )
    return max(here_s, asked_s) + listed_s


def restore_s(case: Case, *, cluster: Cluster, costs: Costs) -> float:
    """Give the time in which each worker gets a checkpoint.

    It is checked twice: as the first one looks for it, or as it comes out of a bucket;
    and by each worker.
    """
    download_s = _transfer_s(case, cluster=cluster, costs=costs)
    return download_s + 2 * costs.kept.crc_s + costs.kept.load_s


def _start(case: Case, *, cluster: Cluster, costs: Costs, allowed: Allowed) -> Limit:
    of_footers_s = footers_s(
        case.shards, cluster=cluster, costs=costs, in_bucket=case.in_bucket
    )
    plan_s = case.shards.num_groups * costs.plan_us_per_group / _MB
    unit_s = case.unit_s(costs, cluster)
    total_s = of_footers_s + plan_s + unit_s
    total_s += restore_s(case, cluster=cluster, costs=costs)
    return Limit(
        name="the start",
        kind="start",
        load=total_s / allowed.start_s,
        needs=f"{total_s:,.0f} s: footers {of_footers_s:,.0f}, a unit {unit_s:,.0f}",
        has=f"{allowed.start_s:,.0f} s",
        flags=("sovit-shards --num-shards", "--data.shuffle-rows"),
    )
