"""Commands work from a folder that has packages of the same names as ours."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from pipelines.config.own_code import PACKAGES, away_from_clashes, look_here_last

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
