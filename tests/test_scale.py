"""docs/scale.md: its loads follow from what was measured, and its command runs."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest

from benchmarks.scale import __main__ as scale
from benchmarks.scale import blocks
from benchmarks.scale.model import (
    HEARD_S,
    Case,
    Costs,
    loads_of,
)
from pipelines.config.serialization import flat_params
from pipelines.data.epoch_plan import GroupTable, plan_epoch
from pipelines.data.reading import Reading, share_tables
from pipelines.data.shard_set import read_shard_set
from pipelines.driver import launch_ray
from pipelines.shards.command import Arguments
from recipes.imagenet import so_vit_14

ROOT = Path(__file__).parents[1]
COSTS = scale.read_costs(scale.RESULT)


def case_of(num_gpus: int, *, num_images: int = 14_197_122, **fields: float) -> Case:
    asked = {"num_images": num_images, "images_per_gpu_s": 1500.0}
    return Case(num_gpus=num_gpus, **{**asked, **fields})  # pyright: ignore[reportArgumentType]


def loads(case: Case, costs: Costs = COSTS) -> dict[str, float]:
    return loads_of(case, costs=costs)


def test_the_published_loads_follow_from_the_published_costs() -> None:
    """Those of the recipe and of the advised settings, of all 27 trainings."""
    for training in json.loads(scale.RESULT.read_text())["trainings"]:
        for name in ("recipe", "advised"):
            of = training[name]
            case = case_of(
                training["num_gpus"],
                num_images=training["num_images"],
                images_per_gpu_s=training["images_per_gpu_s"],
                image_kb=of["image_bytes"] / 1000,
                max_shards=of["num_shards"],
                num_readers=of["num_readers"],
                shuffle_rows=of["shuffle_rows"],
                read_ahead_mb=of["read_ahead_mb"],
                every_epochs=of["validation_every_epochs"],
            )
            found = loads(case)
            published = {name: of["loads"][name] for name in found}
            # A plan and reading a restored checkpoint are not in it: under 1 s.
            assert found == pytest.approx(published, rel=2e-3, abs=2e-3)
            assert max(found, key=found.__getitem__) == of["first"]


def test_the_defaults_are_the_recipe_s() -> None:
    run, case = so_vit_14(), case_of(8)
    for name in ("num_readers", "shuffle_rows", "read_ahead_mb"):
        assert getattr(case, name) == getattr(run.data, name)
    assert case.every_epochs == run.validation.every_epochs
    # What is posted is taken at the next look, and done with at the one after that.
    assert HEARD_S == 2 * launch_ray._LISTEN_EVERY_S


@pytest.mark.parametrize(
    ("num_workers", "num_batches", "image_bytes"),
    [(1, 8, 80_000), (2, 3, 80_000), (8, 4, 1000), (64, 1, 1000)],
)
def test_blocks_are_counted_as_units_are_cut(
    tmp_path: Path, num_workers: int, num_batches: int, image_bytes: int
) -> None:
    batch_size = 64 * num_workers
    num_rows = batch_size * num_batches
    folder = tmp_path / "set"
    blocks.write_copies(
        folder, num_shards=1, num_rows=num_rows, image_bytes=image_bytes
    )
    groups = read_shard_set(str(folder)).groups
    plan = plan_epoch(groups, batch_size=batch_size, shuffle_rows=num_rows)
    cut = Reading(address=str(folder), num_classes=1000, num_workers=num_workers)
    num_blocks = sum(1 for _ in share_tables(plan.unit(0), reading=cut))
    case = case_of(
        num_workers,
        num_images=num_rows,
        image_kb=image_bytes / 1000,
        shuffle_rows=num_rows,
    )
    assert num_rows / case.images_per_block == num_blocks


@pytest.mark.parametrize("num_gpus", [8, 512])
def test_slices_and_files_of_a_unit_are_those_of_a_plan(num_gpus: int) -> None:
    case = case_of(num_gpus, num_images=1_281_167)
    per_shard = case.num_groups // case.num_shards
    rows = np.full(case.num_groups, case.num_images // case.num_groups, dtype=np.int32)
    groups = GroupTable(
        paths=tuple(f"{number:05d}" for number in range(case.num_shards)),
        num_groups=np.full(case.num_shards, per_shard, dtype=np.int32),
        num_rows=rows,
    )
    unit = plan_epoch(
        groups, batch_size=case.epoch.batch_size, shuffle_rows=case.shuffle_rows
    ).unit(1)
    assert unit.num_rows == case.unit_rows
    assert len(unit.slices) == pytest.approx(case.unit_slices, rel=0.1)
    num_files = len({part.path for part in unit.slices})
    assert num_files == pytest.approx(case.unit_files, rel=0.1)


def test_loads_grow_with_images_a_second_and_fall_with_what_is_set() -> None:
    # In a folder of so many files that no unit meets one twice, as good as.
    few, many = (case_of(num, num_images=10**9) for num in (64, 512))
    for name in ("reading", "handing out blocks", "requests to the store"):
        assert loads(many)[name] == pytest.approx(8 * loads(few)[name], rel=0.06)
    more = loads(dataclasses.replace(few, num_readers=32))
    assert more["reading"] == loads(few)["reading"] / 2
    slow = dataclasses.replace(COSTS, block_ms=2 * COSTS.block_ms)
    twice = loads(few, slow)["handing out blocks"]
    assert twice == 2 * loads(few)["handing out blocks"]


def test_flags_that_the_page_names_exist() -> None:
    fields = {name.name for name in dataclasses.fields(Arguments)}
    fields |= {of.name for of in dataclasses.fields(scale.Options)}
    fields |= set(flat_params(so_vit_14())) | {"help", "resume"}
    known = {f"--{name.replace('_', '-')}" for name in fields}
    page = (ROOT / "docs" / "scale.md").read_text()
    named = set(re.findall(r"(?<![\w-])--[a-z][\w.-]*[a-z]", page))
    assert len(named) > 15
    assert named <= known


def test_the_command_prints_and_writes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "result.json"
    asked = ["--num-gpus", "8", "--num-images", "14197122", "--images-per-gpu-s"]
    scale._main([*asked, "1500", "--json", str(out)])
    (training,) = json.loads(out.read_text())["trainings"]
    assert training["loads"] == loads(case_of(8))
    assert "handing out blocks" in capsys.readouterr().out
    scale._main([*asked, "1500", "--block-ms", "900", "--json", str(out)])
    assert json.loads(out.read_text())["costs"]["block_ms"] == 900


@pytest.mark.parametrize("wrong", [{"num_gpus": ()}, {"num_images": (0,)}])
def test_numbers_that_can_not_be_are_refused(wrong: dict[str, tuple[int, ...]]) -> None:
    with pytest.raises(ValueError, match="set --num-gpus"):
        scale.Options(**wrong)  # pyright: ignore[reportArgumentType]


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_blocks_are_timed_on_the_ray_that_is_there(tmp_path: Path) -> None:
    block_ms = blocks.measure_blocks(tmp_path / "set", num_workers=2, num_blocks=20)
    assert block_ms > 0
