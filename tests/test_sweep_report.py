"""What a sweep says at its end: who won, why, and a recipe that can be trained."""

from __future__ import annotations

import dataclasses
import functools
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
from PIL import Image

from pipelines import train
from pipelines.checkpoints.run_record import find_record
from pipelines.config import Run
from pipelines.config.overrides import change_fields, differing
from pipelines.config.own_code import read_code
from pipelines.config.recipes import load_code, load_recipe, own_code_of
from pipelines.driver.fit import fit
from pipelines.driver.preflight import with_absolute_paths
from pipelines.tracking.client import default_uri, sqlite_path
from pipelines.train import _main
from recipes.demo import demo
from sovit import Pooling
from tests.mlflow_stores import prepare_store
from tests.small_sets import write_set
from tests.test_moved import ODD
from tests.test_own_code import forget
from tuning.report import conclude
from tuning.report.figures import (
    draw_importances,
    draw_parallel,
    draw_pareto,
    draw_ranks,
)
from tuning.report.recipe import winner_recipe
from tuning.report.statistics import importances, rank_correlation
from tuning.report.table import as_csv, ranked, table, winner_of
from tuning.search import _begun, _resumed, _split
from tuning.trials.ledger import Sweep, TrialRecord, read_sweep, write_sweep
from tuning.trials.options import Search

DOMAINS = {
    "pooling.power": "uniform (0.3, 0.9) in steps of 0.05",
    "pooling.reduced_dim": "choice([(24, 12), (48, 24)])",
    "optim.lr": "loguniform (0.0005, 0.008)",
}
NO_DIFFERENCE = {"recipe", "storage", "num_checkpoints_to_keep"}


def a_sweep(run: Run | None = None, **search: Any) -> Sweep:
    return Sweep(
        name="searched",
        recipe="demo",
        run=with_absolute_paths(run or demo()),
        space="pooling",
        domains=DOMAINS,
        search=Search(**search),
    )


def trial(number: int, *values: float, status: Any = "finished") -> TrialRecord:
    """Make a trial whose result hangs on its power alone."""
    power = round(0.3 + 0.05 * number, 2)
    dims = [(24, 12), (48, 24)][number % 2]
    rate = 1e-3 * (1 + number % 3)
    return TrialRecord(
        number=number,
        setting={
            "pooling.power": power,
            "pooling.reduced_dim": dims,
            "optim.lr": rate,
        },
        status=status,
        reports=tuple(
            {
                "epoch": float(epoch),
                "val/top1": value,
                "train/images_per_s": 9.0 + number,
            }
            for epoch, value in enumerate(values, start=1)
        ),
    )


ENTRIES = (
    trial(0, 50.0, 60.0),
    trial(1, 52.0, 71.5),
    trial(2, 70.0, status="stopped"),
    trial(3, status="diverged"),
    trial(4, 40.0, status="stopped"),
    trial(5, 51.0, 66.0),
    trial(6, status="waiting"),
)


def test_those_that_finished_come_first_and_bad_ones_last() -> None:
    search = Search()
    order = [entry.number for entry in ranked(search, ENTRIES)]
    assert order[:5] == [1, 5, 0, 2, 4]
    assert order[-1] == 3
    winner = winner_of(search, ENTRIES)
    assert winner is not None
    assert winner.number == 1
    least = Search(modes=("min",))
    assert [entry.number for entry in ranked(least, ENTRIES)][:3] == [0, 5, 1]
    assert winner_of(search, ENTRIES[3:4]) is None


def test_the_table_and_the_file_hold_every_trial() -> None:
    text = table(a_sweep(), ENTRIES)
    rows = [line for line in text.splitlines() if "  finished  " in line]
    assert len(rows) == 3
    assert "71.5" in rows[0]
    assert "diverged" in text
    lines = as_csv(a_sweep(), ENTRIES).splitlines()
    assert len(lines) == 1 + len(ENTRIES)
    assert "pooling.reduced_dim" in lines[0]
    assert '"(48, 24)"' in lines[1]


def test_importance_finds_the_field_that_decides() -> None:
    entries = [trial(n, 50.0 + 3 * n, 60.0) for n in range(12)]
    epoch, shares = importances(
        a_sweep(), [*entries, trial(12, 86.0, status="stopped")]
    )
    assert epoch == 1
    assert set(shares) == set(DOMAINS)
    assert max(shares, key=lambda name: shares[name]) == "pooling.power"
    assert sum(shares.values()) == pytest.approx(1.0, abs=1e-6)
    assert importances(a_sweep(), entries[:3])[1] == {}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"optim.num_epochs": 3, "optim.warmup_epochs": 0.5, "scale.num_workers": 1},
        {"model.kwargs.depth": 3, "optim.schedule.kind": "constant"},
    ],
)
def test_the_winner_is_a_recipe(tmp_path: Path, changes: dict[str, Any]) -> None:
    check_recipe(a_sweep(change_fields(demo(), changes)), ENTRIES[1], folder=tmp_path)


def check_recipe(sweep: Sweep, winner: TrialRecord, *, folder: Path) -> None:
    """Hold the written recipe to the trial's run, and to our layout."""
    file = folder / "winner.py"
    file.write_text(winner_recipe(sweep, winner))
    best = with_absolute_paths(load_recipe(f"{file}:best"))
    wanted = change_fields(sweep.run, winner.setting)
    assert set(differing(wanted, best)) <= NO_DIFFERENCE
    assert set(differing(best, wanted)) <= NO_DIFFERENCE
    root = Path(__file__).parents[1]
    for check in (["format", "--check"], ["check"]):
        config = ["--config", str(root / "pyproject.toml")]
        ruff = [sys.executable, "-m", "ruff", *check, *config, str(file)]
        subprocess.run(ruff, check=True, cwd=root)


OWN = """from __future__ import annotations

import dataclasses

from pipelines.config import Run
from recipes.demo import demo


def run() -> Run:
    start = demo()
    plain = dataclasses.replace(start.model, pooling=None, kwargs={"depth": 2})
    return dataclasses.replace(start, model=plain)
"""


def test_a_winner_of_another_head_and_odd_names_is_a_recipe(tmp_path: Path) -> None:
    """A recipe of one's own without a pooling gets one; strings need any quotes."""
    (tmp_path / "own.py").write_text(OWN)
    recipe = f"{tmp_path}/own.py:run"
    run = load_recipe(recipe)
    model = dataclasses.replace(
        run.model,
        pooling=Pooling(reduced_dim=(12, 6), power=0.4),
        kwargs={"depth": 3, 'a "long" name': "it's a word of very many " * 5},
    )
    sweep = dataclasses.replace(
        a_sweep(dataclasses.replace(run, model=model)),
        recipe=recipe,
        code=own_code_of(recipe),
    )
    winner = dataclasses.replace(ENTRIES[1], setting={"optim.lr": 3e-5, "seed": 7})
    check_recipe(sweep, winner, folder=tmp_path)


MINE = r'''"""A recipe: "C:\new" and """
from timm.models import register_model
from pipelines.config import Data, Model, Optim, Run
from layers.body import Body

NOTE = "é \\ \N{BULLET} LONG"BLANKS
@register_model
def my_winner(pretrained=False, **kwargs):
	return Body(kwargs["num_classes"])

def run() -> Run:
    return Run(
        recipe="mine", model=Model(name="my_winner", img_size=16),
        data=Data(train="shards/train", val="shards/val", batch_size=8),
        optim=Optim(lr=1e-3, num_epochs=1, warmup_epochs=0),
    )
'''
BODY = """from torch import nn

class Body(nn.Sequential):
    def __init__(self, num_classes):
        pool = nn.AdaptiveAvgPool2d(2)
        super().__init__(pool, nn.Flatten(), nn.Linear(12, num_classes))
        self.num_classes = num_classes"""
BODY += "  # as 'its last line': \""


def test_a_winner_of_ones_own_file_trains_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alone, and after the file and what it imports are gone; so does its sweep."""
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    for folder in (home / "layers", elsewhere):
        folder.mkdir(parents=True)
    mine = MINE.replace("LONG", "a long line " * 9).replace("BLANKS", "   ")
    (home / "mine.py").write_text(mine)
    (home / "layers/body.py").write_text(BODY)
    write_set(home / "shards/train", groups=[[16]])
    write_set(home / "shards/val", groups=[[8]])
    (home / "space.py").write_text(
        "from ray import tune\ndef rates(): return {'optim.lr': tune.choice([1, 2])}\n"
    )
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.chdir(home)
    sweep, _ = _begun(*_split(["mine.py:run", "space.py:rates", "--name", "searched"]))
    write_sweep(sweep)
    assert read_sweep("runs", name="searched") == sweep
    check_recipe(
        sweep, TrialRecord(number=0, setting={"optim.lr": 2}), folder=elsewhere
    )

    (home / "mine.py").unlink()
    shutil.rmtree(home / "layers")
    monkeypatch.chdir(elsewhere)
    forget("my_winner")
    resumed, _ = _resumed(*_split(["--resume", str(home / "runs/searched")]))
    assert resumed == sweep
    assert timm.is_model("my_winner")
    forget("my_winner")
    prepare_store("runs")
    monkeypatch.setattr(train, "fit", functools.partial(fit, keep_model=False))
    _main(["winner.py:best", "--name", "best", "--scale.num-workers", "0"])
    record = find_record("runs", name="best")
    assert record is not None
    assert record.status == "finished"
    assert record.run.optim.lr == 2
    assert record.run.data.train == str(home / "shards/train")
    code = read_code(elsewhere / "winner.py")
    assert record.code == code
    forget("my_winner")
    assert sweep.code == load_code(code).CODE  # as a worker does it
    assert timm.is_model("my_winner")
    forget("my_winner")


def test_what_a_sweep_prints_can_be_pasted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    storage = tmp_path / ODD
    sweep = dataclasses.replace(
        a_sweep(), name="s", run=dataclasses.replace(demo(), storage=str(storage))
    )
    uri = default_uri(str(storage))
    conclude._print_next(
        sweep, winner=ENTRIES[1], is_whole=False, uri=uri, view="#/compare"
    )
    lines = capsys.readouterr().out.splitlines()
    texts = {line[:10].strip(): line[12:] for line in lines}
    assert texts["report"] == f"{storage}/s/report"
    said = {name: shlex.split(texts[name]) for name in texts if name != "report"}
    assert said["winner"][1:] == [f"{storage}/s/report/winner.py:best"]
    assert said["compare"][1:] == ["s", "--store", uri]
    assert said["after"][1:] == ["ui", "--backend-store-uri", uri]
    assert sqlite_path(uri) == storage / "mlflow.db"
    more = ["--resume", f"{storage}/s", "--max-gpu-hours", "MORE"]
    assert said["go on"][1:] == more


def test_rank_correlation() -> None:
    assert rank_correlation([1, 2, 3, 4], [10, 20, 30, 40]) == pytest.approx((1, 1))
    assert rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx((-1, -1))
    assert rank_correlation([1, 2, 3], [1, 3, 2]) == pytest.approx((0.5, 1 / 3))
    assert all(value != value for value in rank_correlation([1, 2], [1, 2]))


def test_the_pictures_show_something(tmp_path: Path) -> None:
    sweep = dataclasses.replace(a_sweep(), name="searched")
    entries = [*ENTRIES, *(trial(n, 50.0 + n, 60.0 + n) for n in range(7, 12))]
    for draw in (draw_parallel, draw_pareto, draw_importances):
        draw(sweep, entries, tmp_path / f"{draw.__name__}.png")
    values = [float(n) for n in range(5)]
    path = tmp_path / "ranks.png"
    draw_ranks(values, values[::-1], path, numbers=range(5))
    pictures = sorted(tmp_path.glob("*.png"))
    assert len(pictures) == 4
    for picture in pictures:
        with Image.open(picture) as image:
            assert image.width >= 600
            assert len(image.convert("RGB").getcolors(1 << 24) or []) > 20
