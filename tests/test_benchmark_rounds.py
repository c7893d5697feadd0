"""Benchmarks: time adds up, rounds are compared in pairs, and are shown."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import ingest
from benchmarks.machine import cpu_name, cpu_seconds, machine, machine_cpu_seconds
from benchmarks.timing import Clock, Round, ratios, spread, time_batches
from benchmarks.work import Loaded


class FakeTime:
    """Tell a time that goes on when batches are waited for."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def batches(self, waits_s: Iterator[float], *, num_rows: int) -> Iterator[Loaded]:
        for wait_s in waits_s:
            self.now_s += wait_s
            yield torch.empty(0), torch.empty(num_rows)

    def clock(self) -> Clock:
        return Clock(
            now_s=lambda: self.now_s,
            cpu_s=lambda: 2 * self.now_s,
            machine_cpu_s=lambda: 2.5 * self.now_s,
        )


@given(
    first_s=st.integers(0, 50),
    step_s=st.sampled_from([0.125, 0.25, 0.5, 1.0]),
    num_looked_at=st.integers(1, 5),
    warm_s=st.integers(0, 4),
    measure_s=st.integers(1, 9),
)
def test_a_round_counts_the_steady_stretch_alone(
    first_s: int, step_s: float, num_looked_at: int, warm_s: int, measure_s: int
) -> None:
    time = FakeTime()

    def waits_s() -> Iterator[float]:
        yield first_s
        while True:
            yield step_s

    looked_at: list[int] = []
    found = time_batches(
        time.batches(waits_s(), num_rows=64),
        look=lambda batches: looked_at.append(len(batches)),
        num_looked_at=num_looked_at,
        warm_s=warm_s,
        measure_s=measure_s,
        clock=time.clock(),
    )
    assert looked_at == [num_looked_at]
    assert found.first_batch_s == first_s
    assert found.images_per_s == 64 / step_s
    assert found.images_per_cpu_s == 32 / step_s
    assert found.other_cores == 0.5
    assert found.seconds == max(measure_s, 2 * step_s)
    num_warm = max(warm_s, 2 * step_s) / step_s
    after = (time.now_s - first_s) / step_s
    assert after == num_looked_at - 1 + num_warm + found.seconds / step_s


@given(
    drift=st.lists(st.floats(0.1, 1e4), min_size=1, max_size=9),
    factor=st.floats(0.01, 100),
)
def test_a_drift_of_the_machine_cancels_out(drift: list[float], factor: float) -> None:
    found = ratios([factor * rate for rate in drift], drift)
    assert found.low == pytest.approx(factor)
    assert found.high == pytest.approx(factor)
    assert min(drift) <= spread(drift).median <= max(drift)


BURN = "import time\nwhile time.process_time() < 0.3: pass\n"


def test_cpu_seconds_of_children_count_while_they_run_and_after() -> None:
    machine_s, before_s = machine_cpu_seconds(), cpu_seconds()
    wait = BURN + "print(flush=True)\ninput()"
    grandchild = (
        f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', '''{wait}'''])"
    )
    with subprocess.Popen(
        [sys.executable, "-c", grandchild],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()
        running_s = cpu_seconds() - before_s
        child.communicate("\n")
    ended_s = cpu_seconds() - before_s
    # Ticks are of 10 ms.
    assert running_s > 0.25
    assert ended_s >= running_s
    assert machine_cpu_seconds() - machine_s > 0.25


def a_round(images_per_s: float) -> Round:
    return Round(
        first_batch_s=1.5,
        num_images=round(images_per_s),
        seconds=1.0,
        cpu_s=2.0,
        other_cpu_s=0.25,
    )


ROUNDS = {
    "slow": [a_round(100), a_round(80), a_round(90)],
    "ours": [a_round(400), a_round(300), a_round(360)],
}


def test_the_table_compares_round_by_round() -> None:
    _, first, second, last = ingest.table(ROUNDS).splitlines()
    assert first.split() == ["ours", "360", "[300..400]", "180", "1.5", "s"]
    assert second.split()[:3] == ["slow", "90", "[80..100]"]
    assert second.split()[-3:] == ["4.00", "[3.75..4.00]", "x"]
    assert "0.25 cores" in last
    assert ingest.ours_to_others({"slow": ROUNDS["slow"]}) == {}


def test_json_holds_every_round() -> None:
    written = json.loads(json.dumps(ingest.as_json(ROUNDS)))
    assert written["slow"]["ours_to_this"] == {"median": 4.0, "low": 3.75, "high": 4.0}
    assert written["ours"]["ours_to_this"] is None
    assert [found["num_images"] for found in written["ours"]["rounds"]] == [
        400,
        300,
        360,
    ]


def test_the_machine_is_described() -> None:
    text = "processor\t: 0\nmodel name\t: A CPU @ 2 GHz\nmodel name\t: another\n"
    assert cpu_name(text) == "A CPU @ 2 GHz"
    assert cpu_name("Processor: ARM") == os.uname().machine
    versions = machine()["versions"]
    assert versions["torch"] in torch.__version__
    json.dumps(machine())
