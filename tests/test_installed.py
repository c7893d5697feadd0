"""Commands of a wheel, installed in a fresh environment outside the checkout."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from pipelines.config.own_code import PACKAGES
from tests.installed import ROOT, Installed, install
from tests.small_sets import write_set
from tests.test_moved import ODD
from tests.test_own_code import forget
from tests.test_own_packages import users_folder
from tuning.search import _begun, _split

PAGE = (ROOT / "docs/own.md").read_text()
RECIPE, SPACE = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
COMMANDS = [
    shlex.split(line) for line in PAGE.splitlines() if line.startswith("sovit-")
]
HERE = ("--scale.num-workers", "0")
# A fresh environment, with what a wheel needs, takes minutes.
pytestmark = pytest.mark.slow


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


def test_the_pages_sweep_is_described(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it needs of the page; to carry it out takes Ray."""
    monkeypatch.chdir(project)
    try:
        sweep, space = _begun(*_split(COMMANDS[-1][1:]))
    finally:
        forget("my_small")
    assert list(space) == ["optim.lr"]
    assert sweep.search.num_trials == 8
    assert sweep.space == f"{project}/space.py:rates"
    assert sweep.code is not None
    assert sweep.code.sources == {"mine.py": RECIPE}
