"""Commands of a wheel, installed in a fresh environment outside the checkout."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from pipelines.own_packages import PACKAGES
from tests.installed import ROOT, Installed, install
from tests.small_sets import write_set
from tests.test_moved import ODD
from tests.test_own_packages import users_folder

PAGE = (ROOT / "docs/own.md").read_text()
RECIPE, SPACE = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
COMMANDS = [
    shlex.split(line) for line in PAGE.splitlines() if line.startswith("sovit-")
]
HERE = ("--scale.num-workers", "0")


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    return install(tmp_path_factory.mktemp("installed"))


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Make a user's project: the page's files, shards, and folders named as ours.

    In a path of odd letters.
    """
    (tmp_path / ODD).mkdir()
    folder = users_folder(tmp_path / ODD)
    (folder / "mine.py").write_text(RECIPE)
    (folder / "space.py").write_text(SPACE)
    write_set(folder / "shards/train", groups=[[256]], size=(64, 64))
    write_set(folder / "shards/val", groups=[[64]], size=(64, 64))
    return folder


def test_the_pages_commands_train_a_model_of_ones_own(
    installed: Installed, project: Path
) -> None:
    """As they stand in docs/own.md, but for workers: to start them takes Ray."""
    code = "from importlib.util import find_spec as at\n"
    code += f"print(*[at(name).origin for name in {PACKAGES}])"
    said = installed.run("python", "-I", "-c", code, cwd=project).stdout
    assert said.count(str(installed.folder)) == len(PACKAGES)
    shown, trained, resumed, evaluated, _ = COMMANDS
    assert "my_small" in installed.run(*shown, cwd=project).stdout
    assert not (project / "runs").exists()
    installed.run(*trained, *HERE, cwd=project)
    run = project / "runs/first"
    record = json.loads((run / "run.json").read_text())
    assert record["code"]["sources"] == {"mine.py": RECIPE}

    # As if it had been killed in its last epoch, and the file moved since.
    shutil.rmtree(run / "epoch_0010")
    (run / "run.json").write_text(json.dumps(record | {"status": "running"}))
    (project / "mine.py").unlink()
    installed.run(*resumed, cwd=project)
    assert json.loads((run / "run.json").read_text()) == record
    assert "top-1" in installed.run(*evaluated, cwd=project).stdout


@pytest.mark.ray
def test_the_pages_sweep_finds_a_winner_that_trains_from_any_folder(
    installed: Installed, project: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    *_, sweep = COMMANDS
    few = "--name found --scheduler none --optim.num-epochs 1 --optim.warmup-epochs 0"
    sweep = [word.replace("8", "2") for word in sweep]  # trials
    said = installed.run(*sweep, *few.split(), *HERE, cwd=project).stdout
    winner = next(line for line in said.splitlines() if line.startswith("winner "))
    for file in (project / "mine.py", project / "space.py"):
        file.unlink()
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    installed.run(*shlex.split(winner)[1:], "--name", "best", *HERE, cwd=elsewhere)
    record = json.loads((elsewhere / "runs/best/run.json").read_text())
    assert record["status"] == "finished"
    assert {path.name for path in project.parent.iterdir()} == {ODD}
    assert (project / "runs/mlflow.db").exists()
    compared = next(line for line in said.splitlines() if line.startswith("compare "))
    said = installed.run(*shlex.split(compared)[1:], cwd=elsewhere).stdout
    assert "found-0001" in said
    assert RECIPE.splitlines()[-2] in record["code"]["sources"]["winner.py"]
