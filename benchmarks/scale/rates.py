"""Work out what a run asks for without pause: images, blocks, memory, messages."""

from __future__ import annotations

from benchmarks.scale.loads import Limit
from benchmarks.scale.model import Case, Cluster, Costs
from pipelines.data_config import CPUS_PER_READ

POSTS_PER_LOG = 2
"""Messages of rank 0 to the board each time metrics are due; other ranks send none."""
QUESTIONS_PER_LOG = 1
"""Times that rank 0 then asks the board whether to end."""
POINTS_PER_LOG = 7
"""Values that go to MLflow then."""
POINTS_PER_EPOCH = 12
"""Values that go to MLflow at an epoch's end: of an evaluation and a checkpoint too."""
_STORE_SHARE = 0.3  # of a host's memory: Ray's default
_UNIT_COPIES = 2  # that a read task holds: docs/running.md
BLOCKS_PER_READER = 2
"""Blocks that Ray 2.60 lets a read task put out before they are taken."""
PLANNED_WITHIN = 0.9
"""Share of a segment's time in which rank 0 plans the units of the next."""
_BYTES_PER_GRADIENT = 4
_GB, _MB = 10**9, 10**6


def rates_and_rooms(case: Case, *, cluster: Cluster, costs: Costs) -> list[Limit]:
    """Work out all loads of this kind; MLflow's is left out if it was not measured."""
    found = [
        _blocks(case, costs),
        _reading(case, cluster=cluster, costs=costs),
        _unit_memory(case, cluster=cluster),
        _read_ahead(case),
        _shared_memory(case, cluster=cluster),
        _cpus(case, cluster=cluster),
        _network(case, cluster=cluster, costs=costs),
        _requests(case, cluster=cluster, costs=costs),
        _planning(case, costs),
        _board(case, costs),
        _points(case, costs),
    ]
    return [limit for limit in found if limit is not None]


def _blocks(case: Case, costs: Costs) -> Limit:
    return Limit(
        name="handing out blocks",
        kind="rate",
        load=case.blocks_per_s * costs.block_ms / 1000,
        needs=f"{case.blocks_per_s:,.0f} blocks/s of {case.images_per_block:,.0f}",
        has=f"{1000 / costs.block_ms:,.0f} blocks/s",
        flags=("sovit-shards --short-side", "--data.shuffle-rows"),
    )


def _reading(case: Case, *, cluster: Cluster, costs: Costs) -> Limit:
    needed, has = case.readers_needed(costs, cluster), case.run.data.num_readers
    return Limit(
        name="reading",
        kind="rate",
        load=needed / has,
        needs=f"{needed:,.0f} readers",
        has=f"{has:,}",
        flags=("--data.num-readers",),
    )


def _unit_memory(case: Case, *, cluster: Cluster) -> Limit:
    needed_gb = _UNIT_COPIES * case.run.data.num_readers * case.unit_mb / 1000
    has_gb = cluster.num_hosts(case.num_gpus) * cluster.memory_per_host_gb
    return Limit(
        name="readers' memory",
        kind="room",
        load=needed_gb / has_gb,
        needs=f"{needed_gb:,.0f} GB for units of {case.unit_mb:,.0f} MB",
        has=f"{has_gb:,.0f} GB on all hosts",
        flags=("--data.num-readers", "--data.shuffle-rows", "--data.reader-label"),
    )


def _read_ahead(case: Case) -> Limit:
    # What running tasks may put out counts as much as what they have put out.
    readers = case.run.data.num_readers
    needed_mb = readers * BLOCKS_PER_READER * case.block_mb
    has_mb = case.num_gpus * case.run.data.read_ahead_mb * 2**20 / _MB
    return Limit(
        name="read-ahead for the readers",
        kind="room",
        load=needed_mb / has_mb,
        needs=f"{needed_mb:,.0f} MB for {readers:,} readers",
        has=f"{has_mb:,.0f} MB",
        flags=("--data.read-ahead-mb",),
    )


def _shared_memory(case: Case, *, cluster: Cluster) -> Limit:
    # Two blocks of a worker are being decoded: docs/running.md.
    ahead_mb = case.run.data.read_ahead_mb * 2**20 / _MB + 2 * case.block_mb
    needed_gb = cluster.gpus_per_host * ahead_mb / 1000
    has_gb = _STORE_SHARE * cluster.memory_per_host_gb
    return Limit(
        name="shared memory",
        kind="room",
        load=needed_gb / has_gb,
        needs=f"{needed_gb:,.1f} GB a host",
        has=f"{has_gb:,.0f} GB",
        flags=("--data.read-ahead-mb",),
    )


def _cpus(case: Case, *, cluster: Cluster) -> Limit:
    scale, readers = case.run.scale, case.run.data.num_readers
    needed = case.num_gpus * scale.cpus_per_worker + readers * CPUS_PER_READ
    has = cluster.num_hosts(case.num_gpus) * cluster.cores_per_host
    return Limit(
        name="CPUs that Ray counts",
        kind="room",
        load=needed / has,
        needs=f"{needed:,.0f}",
        has=f"{has:,}",
        flags=("--scale.cpus-per-worker", "--data.num-readers", "--data.reader-label"),
    )


def host_bytes_per_s(
    case: Case, *, cluster: Cluster, costs: Costs
) -> tuple[float, float]:
    """Give what a host takes in: of images, and of gradients.

    Images come twice: from the store to a reader, and from readers on any host to the
    worker. Gradients go round a ring of all hosts, nearly twice their size each step.
    """
    num_hosts = cluster.num_hosts(case.num_gpus)
    per_host = case.images_per_s / num_hosts * case.shards.image_bytes
    elsewhere = (num_hosts - 1) / num_hosts
    gradients = costs.kept.num_params * _BYTES_PER_GRADIENT * case.steps_per_s
    return per_host * (1 + elsewhere), 2 * elsewhere * gradients


def _network(case: Case, *, cluster: Cluster, costs: Costs) -> Limit:
    images, gradients = host_bytes_per_s(case, cluster=cluster, costs=costs)
    needed_gbit = 8 * (images + gradients) / _GB
    return Limit(
        name="a host's network",
        kind="rate",
        load=needed_gbit / cluster.network_per_host_gbit,
        needs=f"{8 * images / _GB:,.1f} Gbit/s of images, "
        f"{8 * gradients / _GB:,.1f} of gradients",
        has=f"{cluster.network_per_host_gbit:,.0f} Gbit/s",
        flags=("sovit-shards --short-side", "--data.batch-size"),
    )


def _requests(case: Case, *, cluster: Cluster, costs: Costs) -> Limit:
    per_image = case.requests_per_unit(costs) / case.unit_rows
    needed = per_image * case.images_per_s
    return Limit(
        name="requests to the store",
        kind="rate",
        load=needed / cluster.store_requests_per_s,
        needs=f"{needed:,.0f}/s",
        has=f"{cluster.store_requests_per_s:,.0f}/s",
        flags=("sovit-shards --short-side",),
    )


def _planning(case: Case, costs: Costs) -> Limit:
    # By a thread of rank 0 while it trains, not between two steps.
    units_s = case.unit_slices * costs.slice_us / _MB
    plan_s = case.shards.num_groups * costs.plan_us_per_group / _MB
    share = units_s * case.images_per_s / case.unit_rows + plan_s / case.epoch_s
    return Limit(
        name="planning ahead",
        kind="rate",
        load=share / PLANNED_WITHIN,
        needs=f"{share:.1%} of the time of a thread of rank 0",
        has=f"{PLANNED_WITHIN:.0%}",
    )


def _logs_per_s(case: Case) -> float:
    return case.steps_per_s / case.run.log_every_steps + 1 / case.epoch_s


def _board(case: Case, costs: Costs) -> Limit:
    needed = (POSTS_PER_LOG + QUESTIONS_PER_LOG) * _logs_per_s(case)
    return Limit(
        name="the driver's board",
        kind="rate",
        load=needed * costs.post_us / _MB,
        needs=f"{needed:,.1f} messages/s",
        has=f"{_MB / costs.post_us:,.0f}/s",
        flags=("--log-every-steps",),
    )


def _points(case: Case, costs: Costs) -> Limit | None:
    if costs.points_per_s is None:
        return None
    needed = POINTS_PER_LOG * _logs_per_s(case) + POINTS_PER_EPOCH / case.epoch_s
    return Limit(
        name="MLflow",
        kind="rate",
        load=needed / costs.points_per_s,
        needs=f"{needed:,.1f} points/s",
        has=f"{costs.points_per_s:,.0f}/s",
        flags=("--log-every-steps",),
    )
