"""Commands work from a folder that has packages of the same names as ours."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.own_packages import PACKAGES, away_from_clashes, look_here_last

ROOT = Path(__file__).parents[1]


def users_folder(folder: Path) -> Path:
    """Make a project with packages that are not ours, and fail when imported."""
    for name in (*PACKAGES, "tests"):
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text("raise SystemExit('the user's')\n")
    return folder


def test_ours_come_first_where_names_clash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", ["", str(tmp_path), "/installed"])
    monkeypatch.chdir(tmp_path)
    look_here_last()
    assert sys.path == ["", str(tmp_path), "/installed"]  # nothing clashes
    users_folder(tmp_path)
    look_here_last()
    assert sys.path == ["/installed", "", str(tmp_path)]
    with away_from_clashes():
        assert Path.cwd() == ROOT
    assert Path.cwd() == tmp_path


def test_in_our_own_folder_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", ["", "/installed"])
    monkeypatch.chdir(ROOT)
    look_here_last()
    assert sys.path == ["", "/installed"]
    with away_from_clashes():
        assert Path.cwd() == ROOT


def test_a_module_run_by_its_name_finds_our_recipes(tmp_path: Path) -> None:
    """As `python -m` does: the working directory stands before what is installed."""
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "__init__.py").write_text("")
    code = (
        f"import sys; sys.path[:0] = ['', {str(ROOT)!r}]\n"
        "from pipelines.cli import run_command\n"
        "def command(arguments):\n"
        "    from pipelines.recipe import load_recipe\n"
        "    print(load_recipe('demo').recipe)\n"
        "run_command(command, prog='x')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": ""},
    )
    assert done.stdout == "demo\n", done.stderr
