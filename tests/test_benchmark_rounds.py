"""Benchmarks: time adds up, rounds are compared in pairs, kept and shown."""

from __future__ import annotations

import functools
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import ingest, machine, rounds
from benchmarks.machine import cpu_name, cpu_seconds, machine_cpu_seconds
from benchmarks.rounds import ratios, run_rounds
from benchmarks.work import Loaded


@given(
    first_s=st.integers(0, 50),
    step_s=st.sampled_from([0.125, 0.25, 0.5, 1.0]),
    warm_s=st.integers(0, 4),
    measure_s=st.integers(1, 9),
)
def test_a_round_counts_the_steady_stretch_alone(
    first_s: int, step_s: float, warm_s: int, measure_s: int
) -> None:
    now_s = 0.0

    def batches() -> Iterator[Loaded]:
        nonlocal now_s
        for wait_s in itertools.chain([first_s], itertools.repeat(step_s)):
            now_s += wait_s
            yield torch.empty(0), torch.empty(64)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ingest.time, "perf_counter", lambda: now_s)
        patch.setattr(ingest, "cpu_seconds", lambda: 2 * now_s)
        found = ingest.time_batches(batches(), warm_s=warm_s, measure_s=measure_s)
    assert found == {
        "images_per_s": 64 / step_s,
        "images_per_cpu_s": 32 / step_s,
        "first_batch_s": first_s,
    }
    num_timed = (max(warm_s, 2 * step_s) + max(measure_s, 2 * step_s)) / step_s
    assert (now_s - first_s) / step_s == num_timed


def records_of(**rates: Sequence[float]) -> pd.DataFrame:
    return pd.DataFrame(
        {"round": number, "case": case, "images_per_s": rate}
        for case, of in rates.items()
        for number, rate in enumerate(of)
    ).assign(images_per_cpu_s=50.0, first_batch_s=1.5)


@given(
    drift=st.lists(st.floats(0.1, 1e4), min_size=1, max_size=9),
    factor=st.floats(0.01, 100),
)
def test_a_drift_of_the_machine_cancels_out(drift: list[float], factor: float) -> None:
    records = records_of(ours=[factor * rate for rate in drift], other=drift)
    found = ratios(records, "images_per_s", to="other")
    assert found["ours"].tolist() == pytest.approx([factor] * len(drift))


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


def test_the_table_compares_round_by_round() -> None:
    records = records_of(slow=[100, 80, 90], ours=[400, 300, 360])
    first, second = ingest.table(records).splitlines()[-2:]
    assert first.split() == [
        "ours",
        "360",
        "[300..400]",
        "50.0",
        "1.5",
        "1.00",
        "[1.00..1.00]",
    ]
    assert second.split() == [
        "slow",
        "90",
        "[80..100]",
        "50.0",
        "1.5",
        "4.00",
        "[3.75..4.00]",
    ]
    assert "ours is" not in ingest.table(records_of(slow=[100]))


def test_cases_take_turns_and_one_that_fails_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clocks = iter(range(100))  # machine's seconds, ours, and those on the wall
    monkeypatch.setattr(rounds, "machine_cpu_seconds", lambda: 3.0 * next(clocks))
    monkeypatch.setattr(rounds, "cpu_seconds", lambda: 0.0)
    monkeypatch.setattr(rounds.time, "monotonic", lambda: 4.0 * next(clocks))
    seen: list[str] = []

    def measure(name: str) -> dict[str, float]:
        seen.append(name)
        if name == "two":
            raise KeyError("stopped here")
        if seen == ["one", "two", "three"]:
            assert json.loads(out.read_text())["missing"] == ["three"]
        return {"figure": 1.0 * len(seen)}

    out = tmp_path / "result.json"
    cases = ("one", "two", "three")
    with pytest.raises(ValueError, match=r"of all cases, got none of \['two'\]"):
        run_rounds(
            {name: functools.partial(measure, name) for name in cases},
            num_rounds=2,
            options="as asked",
            path=out,
            table=lambda frame: " ".join(frame["case"]),
        )
    assert seen == ["one", "two", "three", "one", "three"]
    content = json.loads(out.read_text())
    assert [found["figure"] for found in content["rounds"]] == [1, 3, 4, 5]
    assert {found["other_cores"] for found in content["rounds"]} == {0.75}
    assert (content["options"], content["missing"]) == ("as asked", [])
    assert content["errors"] == {"two": "KeyError: 'stopped here'"}
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]
    said = capsys.readouterr()
    assert said.out.splitlines()[0] == "one three one three"
    assert "0.75 [0.75..0.75] cores" in said.out
    assert "in measure\n" in said.err
    assert "two failed: KeyError: 'stopped here'" in said.err


def test_what_was_measured_is_there_when_the_command_is_interrupted(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupted() -> dict[str, float]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_rounds(
            {"one": lambda: {"of": 1.0}, "two": interrupted, "three": dict},
            num_rounds=1,
            options=None,
            path=None,
            table=lambda frame: "the table",
        )
    said = capsys.readouterr()
    assert "the table" in said.out
    assert "not measured: two; three" in said.err


def test_the_machine_is_described() -> None:
    text = "processor\t: 0\nmodel name\t: A CPU @ 2 GHz\nmodel name\t: another\n"
    assert cpu_name(text) == "A CPU @ 2 GHz"
    assert cpu_name("Processor: ARM") == os.uname().machine
    versions = machine.machine()["versions"]
    assert versions["torch"] in torch.__version__
    json.dumps(machine.machine())
