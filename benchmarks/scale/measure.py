"""Measure what the model of a cluster needs, part by part."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from benchmarks.processes import cpu_seconds, machine_cpu_seconds
from benchmarks.scale import keeping, reading
from benchmarks.scale import plan as planning
from benchmarks.scale.model import Costs, Kept, Shards, shards_of
from benchmarks.scale.options import Options

if TYPE_CHECKING:  # without RAY_ADDRESS no Ray is looked for
    from benchmarks.scale.on_ray import RayCost

_BLOCK_MS = 4.8  # of blocks of 68 kB, on two cores: docs/scale.md
_MAX_RAY_MESSAGES = 10_000
# As many rows as a shard of photographs has, and shards of the set that is read.
_FOOTER_ROWS = 1216
_NUM_READ_SHARDS = 16
# As many rows as recipes read at a time.
_UNIT_ROWS = 2048


@dataclass(kw_only=True)
class Findings:
    """Collect what was measured, part by part."""

    plans: list[planning.PlanCost] = field(default_factory=list)
    footers: list[reading.FooterCost] = field(default_factory=list)
    bucket_footers: list[reading.FooterCost] = field(default_factory=list)
    reads: list[reading.ReadCost] = field(default_factory=list)
    bucket_reads: list[reading.ReadCost] = field(default_factory=list)
    """Of tiny images in as many row groups as a unit of photographs, which shows the
    waits; then of photographs."""
    bucket_streams: list[reading.ReadCost] = field(default_factory=list)
    """Of photographs, without a delay."""
    cuts: list[reading.ReadCost] = field(default_factory=list)
    boards: list[keeping.BoardCost] = field(default_factory=list)
    points_per_s: list[float] = field(default_factory=list)
    kept: list[Kept] = field(default_factory=list)
    rays: list[RayCost] = field(default_factory=list)
    other_cores: float = 0.0
    """Cores that the rest of the machine was busy on meanwhile: a disturbance."""


def costs_of(found: Findings, *, block_ms: float | None) -> Costs:
    """Take the model's constants out of what was measured: of the largest plan.

    Args:
        block_ms: Wins over what was measured.
    """
    plan = max(found.plans, key=lambda plan: plan.num_groups)
    unit = max(plan.units, key=lambda unit: unit.num_slices)
    (read,), bucket_read = found.reads, found.bucket_reads[-1]
    (in_bucket,), (board,) = found.bucket_footers, found.boards
    ray = found.rays[0] if found.rays else None
    further = bucket_read.num_requests - bucket_read.num_slices
    return Costs(
        block_ms=block_ms or (ray.block_ms if ray else _BLOCK_MS),
        plan_us_per_group=1e6 * plan.plan_s / plan.num_groups,
        slice_us=1000 * unit.ms / unit.num_slices,
        task_bytes_per_slice=unit.task_bytes / unit.num_slices,
        set_bytes_per_shard=plan.set_bytes_per_shard,
        footer_ms=min(one.ms for one in found.footers),
        bucket_footer_ms=in_bucket.ms,
        bucket_latency_ms=in_bucket.latency_ms,
        requests_per_file=further / bucket_read.num_files,
        read_mb_s=read.mb / read.seconds,
        bucket_mb_s=max(one.mb / one.seconds for one in found.bucket_streams),
        post_us=ray.post_us if ray else board.post_us,
        heard_s=board.heard_s,
        points_per_s=found.points_per_s[0] if found.points_per_s else None,
        kept=found.kept[0],
    )


def measure(options: Options, *, folder: Path) -> Findings:
    """Measure part after part, with a bar."""
    found = Findings()
    start_s, cpu_s = time.perf_counter(), machine_cpu_seconds() - cpu_seconds()
    parts = _parts(options, folder=folder, found=found)
    bar = tqdm(parts.items(), unit="part", disable=None)
    for name, part in bar:
        bar.set_description(name)
        part()
    cpu_s = machine_cpu_seconds() - cpu_seconds() - cpu_s
    found.other_cores = max(cpu_s / (time.perf_counter() - start_s), 0.0)
    return found


def _parts(
    options: Options, *, folder: Path, found: Findings
) -> Mapping[str, Callable[[], None]]:
    """Name what is measured, in order."""
    all_shards = [_shards(options, num_images=num) for num in options.num_images]

    def plan(shards: Shards) -> Callable[[], None]:
        return lambda: found.plans.append(
            planning.measure_plan(
                shards,
                num_gpus=options.num_gpus,
                images_per_gpu=options.images_per_gpu,
                num_rounds=options.num_rounds,
            )
        )

    def kept(recipe: str) -> Callable[[], None]:
        return lambda: found.kept.append(
            keeping.measure_checkpoint(
                recipe, folder=folder, num_rounds=options.num_rounds
            )
        )

    parts = {f"plan {shards.num_images:,}": plan(shards) for shards in all_shards}
    parts["footers"] = lambda: _footers(options, folder=folder, found=found)
    parts["bucket"] = lambda: _bucket(options, folder=folder, found=found)
    parts["reading"] = lambda: _reading(options, folder=folder, found=found)
    parts["board"] = lambda: found.boards.append(
        keeping.measure_board(
            num_messages=options.num_messages, num_rounds=options.num_rounds
        )
    )
    if options.num_logs:
        parts["MLflow"] = lambda: found.points_per_s.append(
            keeping.measure_mlflow(folder, num_logs=options.num_logs)
        )
    parts |= {f"checkpoint {name}": kept(name) for name in options.recipes}
    if os.environ.get("RAY_ADDRESS"):
        parts["Ray"] = lambda: _ray(options, folder=folder, found=found)
    return parts


def _shards(options: Options, *, num_images: int) -> Shards:
    return shards_of(num_images, image_kb=options.image_kb)


def _write_footers(options: Options, *, folder: Path, num_shards: int) -> str:
    """Write shards whose footers are as long as those of photographs."""
    of_set = _shards(options, num_images=max(options.num_images))
    return reading.write_copies(
        folder,
        num_shards=num_shards,
        num_rows=_FOOTER_ROWS,
        image_bytes=reading.FOOTER_IMAGE_BYTES,
        rows_per_group=-(-_FOOTER_ROWS // of_set.groups_per_shard),
    )


def _write_photographs(options: Options, *, folder: Path, num_rows: int) -> str:
    return reading.write_copies(
        folder,
        num_shards=_NUM_READ_SHARDS,
        num_rows=num_rows // _NUM_READ_SHARDS,
        image_bytes=round(1000 * options.image_kb),
    )


def _footers(options: Options, *, folder: Path, found: Findings) -> None:
    address = _write_footers(
        options, folder=folder / "footers", num_shards=options.num_footers
    )
    for _ in range(options.num_rounds):
        found.footers.append(reading.measure_footers(address))


def _bucket(options: Options, *, folder: Path, found: Findings) -> None:
    _write_footers(
        options, folder=folder / "few", num_shards=options.num_bucket_footers
    )
    _write_photographs(
        options, folder=folder / "unit", num_rows=options.num_bucket_rows
    )
    with reading.bucket(latency_ms=options.cluster.store_latency_ms) as line:
        address = reading.upload(folder / "few", line=line)
        found.bucket_footers.append(reading.measure_footers(address, line=line))
        found.bucket_reads.append(
            reading.measure_bucket_reading(address, line=line, num_rows=_UNIT_ROWS)
        )
        address = reading.upload(folder / "unit", line=line)
        found.bucket_reads.append(
            reading.measure_bucket_reading(
                address, line=line, num_rows=options.num_bucket_rows // 2
            )
        )
        line.latency_s = 0.0
        found.bucket_streams += (
            reading.measure_bucket_reading(
                address, line=line, num_rows=options.num_bucket_rows
            )
            for _ in range(options.num_rounds)
        )


def _reading(options: Options, *, folder: Path, found: Findings) -> None:
    num_rows = options.num_read_rows
    address = _write_photographs(
        options, folder=folder / "photographs", num_rows=num_rows
    )
    found.reads.append(
        reading.measure_reading(
            address, num_rounds=options.num_rounds, num_rows=num_rows // 2
        )
    )
    found.cuts += reading.measure_cutting(
        folder / "cut",
        num_gpus=options.num_gpus,
        images_per_gpu=options.images_per_gpu,
    )


def _ray(options: Options, *, folder: Path, found: Findings) -> None:
    from benchmarks.scale import on_ray

    num_workers = options.num_gpus[0]
    with on_ray.joined():
        found.rays.append(
            on_ray.measure_ray(
                str(folder / "cut"),
                num_workers=num_workers,
                num_messages=min(options.num_messages, _MAX_RAY_MESSAGES),
            )
        )
