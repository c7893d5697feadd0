"""The model of a cluster counts as the code does, and its command runs."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pyarrow as pa
import pytest

from benchmarks.scale import reading
from benchmarks.scale.limits import advised, limits_of
from benchmarks.scale.loads import Allowed, Kind, Limit, first, speed
from benchmarks.scale.model import (
    Case,
    Cluster,
    Costs,
    Kept,
    group_table,
    run_at,
    shards_of,
)
from benchmarks.scale.pauses import footers_s
from benchmarks.scale.rates import PLANNED_WITHIN, host_bytes_per_s
from pipelines.ingest import stream
from pipelines.ingest.footers import read_shard_set
from pipelines.ingest.plan import plan_epoch
from pipelines.ingest.reading import FILES_AT_ONCE, Reading, share_tables

ROOT = Path(__file__).parents[1]
COSTS = Costs(
    block_ms=20,
    plan_us_per_group=0.1,
    slice_us=5,
    task_bytes_per_slice=100,
    set_bytes_per_shard=50,
    footer_ms=0.2,
    bucket_footer_ms=5,
    bucket_latency_ms=100,
    requests_per_file=2,
    read_mb_s=2000,
    bucket_mb_s=500,
    post_us=1,
    heard_s=1,
    points_per_s=5000,
    kept=Kept(
        model="made up",
        num_params=25_000_000,
        num_mb=400,
        copy_s=0.2,
        write_s=0.6,
        crc_s=0.1,
        load_s=0.3,
    ),
)
CLUSTER, ALLOWED = Cluster(), Allowed()


def case_of(
    num_gpus: int,
    *,
    num_images: int = 14_197_122,
    images_per_gpu_s: float = 1500,
    image_kb: float = 110,
    in_bucket: bool = True,
    **data: int,
) -> Case:
    """Describe So-ViT-14's training, some fields of its `data` changed."""
    run = run_at(num_gpus, images_per_gpu=64)
    return Case(
        run=dataclasses.replace(run, data=dataclasses.replace(run.data, **data)),
        shards=shards_of(num_images, image_kb=image_kb),
        images_per_gpu_s=images_per_gpu_s,
        in_bucket=in_bucket,
    )


def loads(case: Case, costs: Costs = COSTS) -> dict[str, float]:
    limits = limits_of(case, cluster=CLUSTER, costs=costs, allowed=ALLOWED)
    return {limit.name: limit.load for limit in limits}


def first_of(case: Case, costs: Costs = COSTS) -> str:
    limits = limits_of(case, cluster=CLUSTER, costs=costs, allowed=ALLOWED)
    return first(limits).name


def test_a_set_is_cut_as_the_documentation_says() -> None:
    assert shards_of(1_281_167, image_kb=110).num_shards == 1050
    assert shards_of(100, image_kb=1).num_shards == 8
    assert shards_of(10**9, image_kb=110, max_shards=5).num_shards == 5
    assert shards_of(10**6, image_kb=110).rows_per_group < 38.2  # 4 MiB
    assert shards_of(10**6, image_kb=27).rows_per_group == pytest.approx(64, rel=0.02)


@pytest.mark.parametrize("image_bytes", [20, 90_000])
def test_the_groups_are_those_that_are_written(
    tmp_path: Path, image_bytes: int
) -> None:
    num_rows = 200
    address = reading.write_copies(
        tmp_path / "set", num_shards=2, num_rows=num_rows, image_bytes=image_bytes
    )
    written = read_shard_set(address).groups
    shards = dataclasses.replace(
        shards_of(2 * num_rows, image_kb=image_bytes / 1000), num_shards=2
    )
    groups = group_table(shards)
    assert groups.num_rows.tolist() == written.num_rows.tolist()
    assert groups.num_groups.tolist() == written.num_groups.tolist()
    assert shards.num_groups == len(groups.num_rows)
    assert groups.total_rows == 2 * num_rows


@pytest.mark.parametrize(
    ("num_workers", "num_batches", "image_bytes"),
    [(1, 8, 80_000), (2, 3, 80_000), (8, 4, 1000), (64, 1, 1000)],
)
def test_blocks_are_counted_as_units_are_cut(
    tmp_path: Path, num_workers: int, num_batches: int, image_bytes: int
) -> None:
    batch_size = 64 * num_workers
    num_rows = batch_size * num_batches
    address = reading.write_copies(
        tmp_path / "set", num_shards=1, num_rows=num_rows, image_bytes=image_bytes
    )
    case = case_of(
        num_workers,
        num_images=num_rows,
        image_kb=image_bytes / 1000,
        shuffle_rows=num_rows,
    )
    plan = plan_epoch(
        read_shard_set(address).groups, batch_size=batch_size, shuffle_rows=num_rows
    )
    cut = Reading(address=address, num_classes=1000, num_workers=num_workers)
    num_blocks = sum(1 for _ in share_tables(plan.unit(0), reading=cut))
    assert case.unit_rows == num_rows
    assert num_rows / case.images_per_block == num_blocks


@pytest.mark.parametrize("num_gpus", [8, 512])
def test_slices_and_files_of_a_unit_are_those_of_a_plan(num_gpus: int) -> None:
    case = case_of(num_gpus, num_images=1_281_167)
    plan = plan_epoch(
        group_table(case.shards),
        batch_size=case.run.data.batch_size,
        shuffle_rows=case.run.data.shuffle_rows,
    )
    unit = plan.unit(1)
    assert unit.num_rows == case.unit_rows
    slices = case.shards.num_slices(unit.num_rows)
    assert len(unit.slices) == pytest.approx(slices, rel=0.1)
    files = case.shards.num_files(unit.num_rows)
    assert len({item.path for item in unit.slices}) == pytest.approx(files, rel=0.1)


def test_what_runs_out_first_depends_on_what_is_set() -> None:
    assert first_of(case_of(8)) == "handing out blocks"
    quick = dataclasses.replace(COSTS, block_ms=0.01)
    needed = math.ceil(case_of(8).readers_needed(quick, CLUSTER))
    assert first_of(case_of(8, num_readers=needed // 2), quick) == "reading"
    many = case_of(8, num_readers=2 * needed)
    assert first_of(many, quick) == "read-ahead for the readers"
    more = case_of(8, num_readers=2 * needed, read_ahead_mb=4096)
    assert max(loads(more, quick).values()) < 1


def test_an_epoch_may_be_too_short_and_a_set_too_large() -> None:
    costs = dataclasses.replace(COSTS, block_ms=0.001)
    short = case_of(512, num_images=1_281_167, in_bucket=False)
    assert first_of(short, costs) == "an epoch's end"
    long = loads(case_of(512, in_bucket=False))["an epoch's end"]
    assert loads(short)["an epoch's end"] == pytest.approx(
        long * 14_197_122 / 1_281_167
    )
    large = case_of(8, num_images=10**10, num_readers=1000, read_ahead_mb=65536)
    assert first_of(large, costs) == "the start"


def with_validation(case: Case, **fields: int) -> Case:
    validation = dataclasses.replace(case.run.validation, **fields)
    run = dataclasses.replace(case.run, validation=validation)
    return dataclasses.replace(case, run=run)


def test_an_evaluation_may_come_rarely_or_beside_training() -> None:
    case = case_of(64, num_images=1_281_167)
    each, beside = (
        loads(one)["an epoch's end"]
        for one in (case, with_validation(case, beside=True))
    )
    rarely = loads(with_validation(case, every_epochs=4))["an epoch's end"]
    assert rarely - beside == pytest.approx((each - beside) / 4)
    pause_s = COSTS.kept.copy_s + COSTS.heard_s
    assert beside == pytest.approx(pause_s / case.epoch_s / ALLOWED.pause_share)


def test_what_is_uploaded_slowly_does_not_hold_up_training_before_it_is_late() -> None:
    case = case_of(64, num_images=1_281_167)
    slow = Cluster(stream_mb_s=1)
    quick_loads, slow_loads = (
        {
            limit.name: limit.load
            for limit in limits_of(case, cluster=one, costs=COSTS, allowed=ALLOWED)
        }
        for one in (CLUSTER, slow)
    )
    for name in ("an epoch's end", "checkpoints by time"):
        assert slow_loads[name] == quick_loads[name]
    writing = slow_loads["writing checkpoints"]
    assert writing == pytest.approx((400 / 1 + COSTS.kept.write_s) / case.epoch_s)
    assert quick_loads["writing checkpoints"] < 1 < writing


@pytest.mark.parametrize(
    "name",
    [
        "reading",
        "handing out blocks",
        "requests to the store",
        "planning ahead",
    ],
)
def test_loads_grow_with_the_images_a_second(name: str) -> None:
    # In a folder of so many files that no unit meets one twice, as good as.
    few, many = (case_of(num, num_images=10**9) for num in (64, 512))
    assert loads(many)[name] == pytest.approx(8 * loads(few)[name], rel=0.06)
    faster = dataclasses.replace(many, images_per_gpu_s=3000)
    assert loads(faster)[name] == pytest.approx(2 * loads(many)[name])


@pytest.mark.parametrize("name", ["the driver's board", "MLflow"])
def test_what_is_told_does_not_grow_with_the_workers(name: str) -> None:
    few, many = (loads(case_of(num, num_images=10**9)) for num in (8, 512))
    assert many[name] == pytest.approx(few[name], rel=0.05)


def test_on_a_path_nothing_waits_for_a_store() -> None:
    near, far = case_of(8, in_bucket=False), case_of(8)
    assert near.requests_per_unit(COSTS) == 0
    assert near.unit_s(COSTS, CLUSTER) == near.unit_mb / COSTS.read_mb_s
    slow = dataclasses.replace(CLUSTER, store_latency_ms=200)
    waiting_s = far.unit_s(COSTS, slow) - far.unit_s(COSTS, CLUSTER)
    assert waiting_s == pytest.approx(0.1 * far.waits_per_unit(COSTS))
    assert loads(near)["requests to the store"] == 0
    assert footers_s(
        near.shards, cluster=CLUSTER, costs=COSTS, in_bucket=False
    ) == pytest.approx(near.shards.num_shards * COSTS.footer_ms / 1000)


def test_files_in_a_bucket_are_read_beside_each_other() -> None:
    at_once = min(FILES_AT_ONCE, pa.io_thread_count())
    case = case_of(8)
    assert case.unit_files > FILES_AT_ONCE
    waits = 2 * case.unit_files / FILES_AT_ONCE + case.unit_slices / at_once
    assert case.waits_per_unit(COSTS) == pytest.approx(waits)
    one = dataclasses.replace(
        case, shards=dataclasses.replace(case.shards, num_shards=1)
    )
    assert one.waits_per_unit(COSTS) == pytest.approx(one.requests_per_unit(COSTS))
    assert case_of(8, in_bucket=False).waits_per_unit(COSTS) == 0


@pytest.mark.parametrize(("stream_mb_s", "bucket_mb_s"), [(90, 10_000), (1000, 300)])
def test_bytes_come_as_fast_as_connections_and_the_reader_let_them(
    stream_mb_s: float, bucket_mb_s: float
) -> None:
    cluster = Cluster(stream_mb_s=stream_mb_s, store_latency_ms=0)
    costs = dataclasses.replace(COSTS, bucket_mb_s=bucket_mb_s, read_mb_s=math.inf)
    at_once = min(FILES_AT_ONCE, pa.io_thread_count())
    case = case_of(8)
    mb_s = min(stream_mb_s * at_once, bucket_mb_s)
    assert case.unit_s(costs, cluster) == pytest.approx(case.unit_mb / mb_s)


def test_units_are_planned_ahead_for_as_long_as_the_stream_lets() -> None:
    assert stream._OPEN_AT_SHARE == PLANNED_WITHIN


def test_images_come_to_a_host_twice_and_gradients_nearly_so() -> None:
    images, gradients = host_bytes_per_s(case_of(8), cluster=CLUSTER, costs=COSTS)
    assert (images, gradients) == (12_000 * 110_000, 0)
    images, gradients = host_bytes_per_s(case_of(512), cluster=CLUSTER, costs=COSTS)
    assert images == pytest.approx(2 * 12_000 * 110_000, rel=0.01)
    assert gradients == pytest.approx(2 * 4 * 25e6 * 1500 / 64, rel=0.02)


@pytest.mark.parametrize("num_gpus", [8, 64, 512])
@pytest.mark.parametrize("num_images", [1_281_167, 10**9])
def test_advice_is_no_worse_and_fits(num_gpus: int, num_images: int) -> None:
    case = case_of(num_gpus, num_images=num_images)
    small = shards_of(num_images, image_kb=27, max_shards=50_000)
    better = advised(case, shards=small, cluster=CLUSTER, costs=COSTS, allowed=ALLOWED)
    assert max(loads(better).values()) < max(loads(case).values())
    limits = limits_of(better, cluster=CLUSTER, costs=COSTS, allowed=ALLOWED)
    assert all(limit.load <= 1 for limit in limits if limit.kind == "room")
    assert loads(better)["reading"] <= 1
    is_short = loads(case)["an epoch's end"] > 1
    assert (better.run.validation.every_epochs > 1) == is_short


def test_speed_is_what_the_slowest_rate_lets_through() -> None:
    def limit(load: float, kind: Kind = "rate") -> Limit:
        return Limit(name="", kind=kind, load=load, needs="", has="")

    assert speed([limit(0.5), limit(4), limit(9, "pause")]) == 0.25
    assert speed([limit(0.5)]) == 1
