"""Steps, rates, times and warnings of a run that has not begun."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from pipelines.config import Optim, Run, Scale, Schedule
from pipelines.data.batch import Position
from pipelines.data.shard_set import read_shard_set
from pipelines.dry_run import timing
from pipelines.dry_run.lr_plot import NUM_COLUMNS, NUM_ROWS, draw_text
from pipelines.dry_run.machine import Machine, warnings_of
from pipelines.dry_run.progress_left import remaining_of
from pipelines.dry_run.report import hours_text, size_text
from pipelines.dry_run.timing import time_here
from tests.small_runs import small_run
from tests.small_sets import write_set

CPU = torch.device("cpu")


def columns(optim: Optim) -> list[str]:
    lines = draw_text(optim, steps_per_epoch=10).splitlines()[:NUM_ROWS]
    rows = [line.partition("|")[2].ljust(NUM_COLUMNS) for line in lines]
    return ["".join(column) for column in zip(*rows, strict=True)]


def test_the_curve_rises_falls_and_never_hides_a_rate() -> None:
    schedule = Schedule(kind="step", milestones=(6, 9), gamma=1e-3)
    optim = Optim(lr=0.5, num_epochs=12, warmup_epochs=3, schedule=schedule)
    found = columns(optim)
    heights = [len(column.strip()) for column in found]
    assert len(found) == NUM_COLUMNS
    warm, flat = NUM_COLUMNS * 3 // 12, NUM_COLUMNS * 6 // 12
    assert heights[:warm] == sorted(heights[:warm])
    assert set(heights[warm:flat]) == {NUM_ROWS}
    assert {column.strip() for column in found[flat:]} == {"▁"}
    text = draw_text(optim, steps_per_epoch=10)
    assert text.startswith("     0.5 |")
    assert text.splitlines()[-1].split() == ["0", "3", "6", "9", "12", "epochs"]
    assert draw_text(optim, steps_per_epoch=10, is_plain=True).isascii()


def test_one_epoch_has_an_axis_too() -> None:
    optim = Optim(lr=1, num_epochs=1, warmup_epochs=0)
    last = draw_text(optim, steps_per_epoch=1).splitlines()[-1]
    assert last.split() == ["0", "1", "epochs"]


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("explain") / "shards"
    return write_set(folder, groups=[[10, 10], [9]])


def test_steps_and_images_are_counted_to_the_end(address: str) -> None:
    run = small_run(address, batch_size=8, ema_decay=0.9)
    run = dataclasses.replace(
        run,
        data=dataclasses.replace(run.data, eval_mirror=True),
        validation=dataclasses.replace(run.validation, every_epochs=2),
    )
    shards = read_shard_set(address)

    def course(**position: int) -> Any:
        start = Position(**position)
        return remaining_of(run, train_shards=shards, num_held_out=29, start=start)

    new = course()
    assert (new.steps_per_epoch, new.num_steps, new.last_batch_size) == (4, 12, 5)
    assert new.num_images_left == 3 * 29
    # After epochs 2 and 3, of two weights each, and of the mirror images.
    assert new.num_evaluated_left == 2 * 2 * 2 * 29
    later = course(epoch=1, batch=2, step=6)
    assert later.num_steps_done == 6
    assert later.num_images_left == 2 * 29 - 16
    assert course(epoch=2, step=8).num_evaluated_left == 2 * 2 * 29
    assert course(epoch=3, step=12).num_images_left == 0


def test_repeated_images_count_as_often_as_they_come(address: str) -> None:
    run = small_run(address, batch_size=8)
    run = dataclasses.replace(
        run, augment=dataclasses.replace(run.augment, num_repeats=2)
    )
    shards = read_shard_set(address)
    found = remaining_of(run, train_shards=shards, num_held_out=0, start=Position())
    # 15, 14 and 15 rows of 29, in batches of four rows.
    assert found.num_steps == 4 + 4 + 4
    assert found.num_images_left == 2 * (15 + 14 + 15)
    assert found.last_batch_size == 2 * 3


MACHINE = Machine(
    num_cpus=4,
    num_gpus=0,
    memory_bytes=10**9,
    gpu_bytes=0,
    disk_bytes=10**9,
    is_on_cluster=False,
)


def warned(run: Run, *, worker_bytes: int = 1, **machine: Any) -> str:
    return "\n".join(
        warnings_of(
            run,
            machine=dataclasses.replace(MACHINE, **machine),
            worker_bytes=worker_bytes,
            checkpoints_bytes=1000,
        )
    )


def test_what_the_machine_lacks_is_warned_of() -> None:
    run = small_run("none")
    assert warned(run) == ""
    on_gpus = dataclasses.replace(run, scale=Scale(num_workers=2, use_gpu=True))
    assert warned(on_gpus).startswith("it wants GPUs, and here is none")
    assert "2 workers want a GPU each, here are 1" in warned(on_gpus, num_gpus=1)
    big = {"worker_bytes": 2000, "num_gpus": 2, "gpu_bytes": 1000}
    assert "more than that of a GPU" in warned(on_gpus, **big)
    assert warned(on_gpus, num_gpus=2, gpu_bytes=1000) == ""
    crowd = dataclasses.replace(run, scale=Scale(num_workers=3, cpus_per_worker=2))
    assert "3 workers want 6 CPUs, here are 4" in warned(crowd)
    data = dataclasses.replace(run.data, num_decode_threads=8)
    decoding = dataclasses.replace(run, data=data)
    assert "8 threads that decode" in warned(decoding)
    assert "set --scale.cpus-per-worker 8, or lower" in warned(decoding)
    assert "8 threads, and Ray reserves 1 CPUs" in warned(decoding)
    on_gpu = dataclasses.replace(decoding, scale=Scale(use_gpu=True, cpus_per_worker=2))
    assert "set --scale.cpus-per-worker 9, or" in warned(on_gpu, num_gpus=1)
    enough = Scale(use_gpu=True, cpus_per_worker=9)
    elsewhere = dataclasses.replace(data, decode_on="readers")
    for fine in (
        dataclasses.replace(decoding, scale=enough),
        dataclasses.replace(decoding, scale=Scale(num_workers=0)),
        dataclasses.replace(decoding, data=elsewhere),
    ):
        assert "Ray reserves" not in warned(fine, num_gpus=1)
    assert "more than this machine has" in warned(run, worker_bytes=2 * 10**9)
    assert "less room on the disk" in warned(run, disk_bytes=999)
    assert warned(run, disk_bytes=0, memory_bytes=0) == ""
    assert "every host" in warned(crowd, is_on_cluster=True)
    schedule = Schedule(kind="step", milestones=(2, 30))
    optim = dataclasses.replace(run.optim, schedule=schedule)
    assert "milestones in epoch 30" in warned(dataclasses.replace(run, optim=optim))


def test_steps_are_timed_and_leave_torch_as_it_was(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing, "_MATRIX_S", 0.01)
    monkeypatch.setattr(timing, "_MAX_STEPS", 2)
    run = small_run(address, ema_decay=0.9, mixup=0.2)
    run = dataclasses.replace(run, scale=Scale(deterministic=True, cpus_per_worker=2))
    before, drawn = torch.get_num_threads(), torch.get_rng_state()
    arguments = {"num_classes": 3, "training_macs": 10**6, "device": CPU}
    found = time_here(run, room_images=5, **arguments)
    assert (found.batch_size, found.num_threads) == (5, 2)
    assert min(found.matrix_rate, found.images_per_s) > 0
    assert torch.get_num_threads() == before
    assert torch.equal(torch.get_rng_state(), drawn)
    assert not torch.are_deterministic_algorithms_enabled()
    assert time_here(run, room_images=1, **arguments).batch_size == 0
    arguments["training_macs"] = 10**15
    assert time_here(run, room_images=99, **arguments).images_per_s == 0


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (98.6e6, "98.6 MB"),
        (2e15, "2,000.0 TB"),
    ],
)
def test_sizes_have_units(num_bytes: float, text: str) -> None:
    assert size_text(num_bytes) == text


def test_durations_have_units() -> None:
    assert hours_text(0.5) == "30 min"
    assert hours_text(12.34) == "12.3 h"
    assert hours_text(1234.5) == "1,234 h"
