"""A run without a held-out set, where that is what was asked for."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest

from pipelines.config import Run, Validation
from pipelines.driver.fit import fit
from pipelines.driver.preflight import check_run
from pipelines.train import _main
from tests.demo_runs import RECIPE, small_demo
from tests.mlflow_stores import prepare_store
from tests.test_train import runs_of
from tuning.checks import check_sweep
from tuning.trials.options import Search

FLAG = "--validation.no-held-out"


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = small_demo(tmp_path, num_epochs=2, num_workers=0)
    prepare_store(run.storage)
    return dataclasses.replace(run, data=dataclasses.replace(run.data, val=""))


def test_it_is_never_guessed(run: Run) -> None:
    with pytest.raises(ValueError, match=rf"data\.val: .*got none; .*{FLAG}"):
        check_run(run)
    with pytest.raises(ValueError, match=f"{FLAG}; leave out either"):
        Validation(held_out=False, also=("v2=shards",))


def test_it_trains_to_its_end_and_keeps_its_model(
    run: Run, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from pipelines.config.serialization import to_json

    (tmp_path / "run.json").write_text(to_json(run))
    (tmp_path / "recipe.py").write_text(RECIPE)
    command = [f"{tmp_path}/recipe.py:small", "--name", "without", FLAG]
    _main([*command, "--dry-run"])
    assert "none: nothing is evaluated" in capsys.readouterr().out
    _main(command)
    said = capsys.readouterr().out
    assert "nothing held out" in said
    assert "held-out top-1" not in said
    (tracked,) = runs_of(run.storage)
    assert tracked.info.status == "FINISHED"
    assert math.isnan(tracked.data.metrics["val/top1"])
    assert "data.val.digest" not in tracked.data.tags
    assert tracked.outputs.model_outputs


def test_a_sweep_has_nothing_to_compare_by(run: Run) -> None:
    run = dataclasses.replace(run, validation=Validation(held_out=False))
    with pytest.raises(ValueError, match=f"by which trials are compared.*{FLAG}"):
        check_sweep(run, search=Search())
    trained = fit(run, name="without", keep_model=False)
    assert trained.best is None
    assert not [name for name in trained.metrics if name.startswith("val")]
