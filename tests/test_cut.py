"""A driver that is killed again and again ends with the weights of one that is not."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import pytest

from pipelines.config import Run
from pipelines.config.overrides import change_fields
from pipelines.config.serialization import to_json
from pipelines.worker.audit_log import trained
from tests.demo_runs import RECIPE
from tests.fault_runs import brief_run, learnt
from tests.lives import begin, cut_at, last_step
from tests.mlflow_stores import prepare_store
from tests.test_train import runs_of

SEED = 20261127
NUM_STEPS = 30


@pytest.fixture(params=[0.0, 1.0], ids=["plain", "balanced"])
def run(tmp_path: Path, request: pytest.FixtureRequest) -> Run:
    run = brief_run(tmp_path, num_epochs=3)
    run = change_fields(run, {"data.balance": request.param})
    prepare_store(run.storage)
    scale = dataclasses.replace(run.scale, deterministic=True)
    return dataclasses.replace(run, scale=scale)


def test_a_run_cut_at_random_three_times_is_the_unbroken_one_bit_for_bit(
    run: Run, tmp_path: Path
) -> None:
    (tmp_path / "run.json").write_text(to_json(run))
    (tmp_path / "recipe.py").write_text(RECIPE)
    log, keys = tmp_path / "log", {name: tmp_path / name for name in ("whole", "cut")}
    commands = {
        name: [f"{tmp_path}/recipe.py:small", "--resume", name, "--audit-log", str(of)]
        for name, of in keys.items()
    }
    whole = begin(commands["whole"], log=log)
    whole.join()
    assert whole.exitcode == 0, log.read_text()

    cuts = sorted(random.Random(SEED).sample(range(NUM_STEPS - 1), 3))
    print(f"seed {SEED}: cut from steps {cuts} on")
    for step in cuts:
        life = begin(commands["cut"], log=log)
        cut_at(step, process=life, audit_log=keys["cut"], log=log)
        print(f"cut in step {last_step(keys['cut'])}")
    last = begin(commands["cut"], log=log)
    last.join()
    assert last.exitcode == 0, log.read_text()

    wanted, found = (
        learnt(Path(run.storage, name, "epoch_0003")) for name in ("whole", "cut")
    )
    assert found["position"].step == NUM_STEPS
    assert found == wanted
    assert trained(keys["cut"]) == trained(keys["whole"])

    (tracked,) = [of for of in runs_of(run.storage) if of.info.run_name == "cut"]
    assert tracked.info.status == "FINISHED"
    assert tracked.data.tags["num_restarts"] == "3"
