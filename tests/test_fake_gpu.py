"""Code for a GPU makes the host wait, and moves data, only where it is meant to.

Of whole steps on a GPU that is none: see tests/fake_gpu.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
from _pytest.mark.structures import ParameterSet

from tests.fake_gpu.build import ROOT, build, what_lacks
from tests.fake_gpu.cases import CASES, COMPILED, ENTERED, SLOW
from tests.fake_gpu.entered import ANSWERS, CALLS, offered
from tests.fake_gpu.meant import MEANT
from tests.fake_gpu.watch import Seen

Outcomes = Mapping[str, Mapping[str, Any]]
_LIMIT_S = 1800


def marked(names: Iterable[str]) -> list[ParameterSet]:
    """Mark the slow ones of some cases."""
    return [
        pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else [])
        for name in names
    ]


@pytest.fixture(scope="session")
def outcomes(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Outcomes:
    """Do all that is asked for in one process, which takes a stand-in for CUDA."""
    if lacking := what_lacks():
        pytest.skip(lacking)
    env = build(tmp_path_factory.mktemp("fake_gpu"))
    items = [item for item in request.session.items if item.path == Path(__file__)]
    specs = [vars(item).get("callspec") for item in items]
    names = [spec.params["name"] if spec else ENTERED for spec in specs]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.fake_gpu", *names],
        env=env,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=_LIMIT_S,
        check=False,
    )
    lines = [json.loads(x) for x in done.stdout.splitlines() if x.startswith("{")]
    assert {line["case"] for line in lines} == set(names), done.stderr[-2000:]
    return {line["case"]: line for line in lines}


@pytest.mark.parametrize("name", marked(CASES))
def test_the_host_waits_and_copies_where_it_is_meant(
    name: str, outcomes: Outcomes
) -> None:
    outcome = outcomes[name]
    assert not outcome["error"], outcome["error"]
    assert outcome["num_ops"] > 0, "nothing was done on the device"
    seen = [Seen(**one) for one in outcome["seen"]]
    assert [one.told for one in seen] == list(MEANT.get(name, ())), seen


@pytest.mark.parametrize("name", marked(COMPILED))
def test_a_compiled_step_is_one_graph_that_waits_for_nothing(
    name: str, outcomes: Outcomes
) -> None:
    outcome = outcomes[name]
    assert not outcome["error"], outcome["error"]
    graphs = {"forward": 1, "backward": 1}
    assert outcome["found"] == {"num_graphs": graphs, "breaks": []}
    assert outcome["seen"] == []


def test_every_function_that_asks_for_the_device_is_entered(outcomes: Outcomes) -> None:
    # A new one wants a call in tests/fake_gpu/entered.py.
    assert set(offered()) == set(CALLS)
    wanted = {name: ANSWERS.get(name) for name in CALLS}
    assert outcomes[ENTERED]["found"] == wanted
