"""What the scale benchmark measures is the code that trains, and its command runs."""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from benchmarks.scale import command, keeping, on_ray, reading
from benchmarks.scale.limits import limits_of
from benchmarks.scale.loads import Allowed
from benchmarks.scale.measure import Findings
from benchmarks.scale.model import (
    Cluster,
    run_at,
    shards_of,
)
from benchmarks.scale.options import Options
from benchmarks.scale.plan import measure_plan
from benchmarks.scale.rates import (
    POINTS_PER_EPOCH,
    POINTS_PER_LOG,
    POSTS_PER_LOG,
    QUESTIONS_PER_LOG,
)
from benchmarks.scale.report import markdown
from pipelines import ray_group, ray_trainer
from pipelines.alone import Alone
from pipelines.files import Place
from pipelines.ingest.footers import read_shard_set
from pipelines.job import Job
from pipelines.runfile import flat_params
from pipelines.shards.command import Arguments
from pipelines.telling.board import Board, Item, Measured
from pipelines.validation.labels import held_out_of
from pipelines.worker import Worker
from tests.demo_runs import small_demo
from tests.test_scale import ALLOWED, CLUSTER, COSTS, case_of

ROOT = Path(__file__).parents[1]


def test_the_board_is_heard_as_often_as_on_ray() -> None:
    assert keeping.LISTEN_EVERY_S == ray_trainer._LISTEN_EVERY_S
    assert keeping.ASK_EVERY_S == ray_group._POLL_S
    found = keeping.measure_board(num_messages=10, num_rounds=2)
    # What is posted is taken at the next look, and done with at the one after that.
    assert found.heard_s >= keeping.LISTEN_EVERY_S


class Counting(Alone):
    """Count what a worker posts and asks."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.posted: list[Item] = []
        self.num_asked = 0

    def post(self, item: Item) -> None:
        self.posted.append(item)

    def is_ending(self) -> bool:
        self.num_asked += 1
        return False

    def report(self, metrics: Mapping[str, float]) -> None:
        """Tell nobody."""


def test_messages_are_counted_as_a_worker_sends_them(tmp_path: Path) -> None:
    run = small_demo(tmp_path, num_epochs=1, num_workers=0)
    run = dataclasses.replace(run, log_every_steps=2)
    val = read_shard_set(run.data.val)
    job = Job(
        run=run,
        train_shards=read_shard_set(run.data.train),
        val_shards=val,
        held_out=held_out_of(run.validation, val=val, classes=val.classes),
        tracking_uri="",
        mlflow_run_id="",
    )
    group = Counting(job, folder=Place(str(tmp_path)), callbacks=[], board=Board())
    with Worker(job, group=group) as worker:
        worker.train()
    num_logs = worker.state.position.step // 2
    assert num_logs == 5
    assert group.num_asked == num_logs * QUESTIONS_PER_LOG
    kinds = Counter(type(item).__name__ for item in group.posted)
    # Beside them: that it began, and how it computes; an epoch's end, its values, its
    # pictures; that its checkpoint was kept, the seconds of its pause and its writing.
    assert sum(kinds.values()) == num_logs * POSTS_PER_LOG + 8
    points = [item.metrics for item in group.posted if isinstance(item, Measured)]
    assert sum(map(len, points)) == num_logs * POINTS_PER_LOG + POINTS_PER_EPOCH


def test_plans_are_measured_at_their_size() -> None:
    shards = shards_of(100_000, image_kb=110)
    found = measure_plan(shards, num_gpus=(2, 8), images_per_gpu=64, num_rounds=1)
    assert found.num_groups == shards.num_groups
    assert [unit.num_workers for unit in found.units] == [2, 8]
    # An order and a sum of rows are left; sorting takes some numbers of 8 bytes more.
    assert found.plan_mb * 1e6 > 12 * found.num_groups
    assert found.set_mb * 1e6 > 4 * found.num_groups


def flags_of(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--[a-z][\w.-]*[a-z]", text))


def known_flags() -> set[str]:
    """Name all flags of sovit-train, sovit-shards and this benchmark."""
    fields = {name.name for name in dataclasses.fields(Arguments)}
    options = {f"cluster.{one.name}" for one in dataclasses.fields(Cluster)}
    options |= {f"allowed.{one.name}" for one in dataclasses.fields(Allowed)}
    options |= {one.name for one in dataclasses.fields(Options)}
    run = set(flat_params(run_at(8, images_per_gpu=64)))
    names = {name.replace("_", "-") for name in fields | options | run}
    return {f"--{name}" for name in names} | {"--help", "--no-in-bucket", "--resume"}


def test_flags_that_are_named_exist() -> None:
    limits = limits_of(case_of(8), cluster=CLUSTER, costs=COSTS, allowed=ALLOWED)
    named = flags_of(" ".join(flag for limit in limits for flag in limit.flags))
    assert len(named) > 5
    assert named <= known_flags()
    in_document = flags_of((ROOT / "docs" / "scale.md").read_text())
    assert named - {"--scale.cpus-per-worker"} <= in_document
    assert in_document <= known_flags()


def test_a_table_is_as_wide_as_what_is_in_it() -> None:
    lines = markdown(("a", "bb"), [("long", "c")]).splitlines()
    assert lines == ["| a    | bb |", "| ---- | -- |", "| long | c  |"]


TINY = ["--num-gpus", "2", "4", "--num-images", "5000", "--images-per-gpu-s", "100"]
TINY += ["--images-per-gpu", "4", "--image-kb", "1", "--small-kb", "0.5"]
TINY += ["--recipes", "demo", "--num-footers", "4", "--num-bucket-footers", "3"]
TINY += ["--num-bucket-rows", "64", "--num-read-rows", "64", "--num-rounds", "1"]
TINY += ["--num-messages", "10", "--num-logs", "0", "--cluster.store-latency-ms", "1"]


def test_the_command_measures_prints_and_writes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "_PLOTTED_GPUS", (2, 4))
    out, picture = tmp_path / "result.json", tmp_path / "loads.png"
    command._main([*TINY, "--json", str(out), "--plot", str(picture)])
    printed = capsys.readouterr().out
    content = json.loads(out.read_text())
    assert set(content["measured"]) == {
        one.name for one in dataclasses.fields(Findings)
    }
    reads = content["measured"]["bucket_reads"]
    assert len(reads) == 2
    for read in reads + content["measured"]["bucket_streams"]:
        assert read["num_requests"] == 2 * read["num_files"] + read["num_slices"]
    (footers,) = content["measured"]["bucket_footers"]
    # A listing, the classes' two; of each shard its footer, and in so small a set the
    # labels of all its groups, which lie side by side.
    assert footers["num_requests"] == 3 + 2 * footers["num_shards"]
    assert content["costs"]["requests_per_file"] == 2
    assert content["costs"]["points_per_s"] is None
    assert [one["num_gpus"] for one in content["trainings"]] == [2, 4]
    for one in content["trainings"]:
        assert one["recipe"]["first"] in printed
        assert one["advised"]["first"] in printed
    assert picture.read_bytes().startswith(b"\x89PNG")
    slow = tmp_path / "slow.json"
    command._main(
        [*TINY, "--costs", str(out), "--block-ms", "900", "--json", str(slow)]
    )
    assert json.loads(slow.read_text())["costs"]["block_ms"] == 900
    again = tmp_path / "again.json"
    command._main([*TINY, "--costs", str(out), "--json", str(again)])
    assert json.loads(again.read_text())["trainings"] == content["trainings"]


def test_wrong_options_and_results_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="set --num-gpus"):
        Options(num_gpus=())
    with pytest.raises(ValueError, match="set --num-gpus"):
        Options(images_per_gpu=1)
    (tmp_path / "result.json").write_text("{}")
    for name in ("result.json", "none.json"):
        with pytest.raises(ValueError, match=f"{name}.*leave out --costs"):
            command.read_costs(tmp_path / name)


def test_ray_is_measured_where_it_is(
    ray_local: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(on_ray, "_NUM_BLOCKS", 20)
    address = reading.write_copies(
        tmp_path / "set", num_shards=2, num_rows=60, image_bytes=100
    )
    with on_ray.joined():
        found = on_ray.measure_ray(address, num_workers=2, num_messages=20)
    # Ten units of a block for each worker; the first block begins the time.
    assert found.num_blocks == 19
    assert found.block_ms > 0
    assert found.post_us > 0
