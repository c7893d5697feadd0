"""Where a command can't write, it says so before it works."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from benchmarks import heads, ingest, model
from benchmarks.scale import __main__ as scale
from pipelines import evaluate, predict, preview
from pipelines.cli import outputs
from pipelines.export import command as export
from pipelines.results import compare as compare

Command = Callable[[Sequence[str]], object]
# None of what they are to work on is there: an output is looked at first.
FILES: list[tuple[Command, list[str]]] = [
    (predict._main, ["no_checkpoint", "no.jpg", "--json"]),
    (evaluate._main, ["no_checkpoint", "no_shards", "--json"]),
    (evaluate._main, ["no_checkpoint", "no_shards", "--corruptions", "--plot"]),
    (compare._main, ["no_run", "--html"]),
    (compare._main, ["no_run", "--csv"]),
    (compare._main, ["no_run", "--plot"]),
    (preview._main, ["demo", "--data.train", "no_shards", "--out"]),
    *((module._main, ["--json"]) for module in (heads, ingest, model, scale)),
    (heads._main, ["--plot"]),
]


@pytest.mark.parametrize(("command", "arguments"), FILES)
def test_a_file_in_no_folder_is_refused_first(
    command: Command, arguments: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "none" / "file.png"
    with pytest.raises(ValueError, match="in a folder that is there, got") as caught:
        command([*arguments, str(path)])
    assert str(caught.value).startswith(f"{arguments[-1].removeprefix('--')}: ")
    assert str(path.parent) in str(caught.value)


@pytest.mark.parametrize(
    ("command", "arguments"), [case for case in FILES if case[1][-1] != "--json"]
)
def test_a_folder_or_another_suffix_is_no_picture(
    command: Command, arguments: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "folder.png"
    path.mkdir()
    with pytest.raises(
        ValueError, match=r"expected a file that can be written.*folder"
    ):
        command([*arguments, str(path)])
    if arguments[-1] in ("--plot", "--out"):
        with pytest.raises(ValueError, match=r"ends in \.png, \.svg, \.pdf"):
            command([*arguments, str(tmp_path / "picture.jpg")])


def test_a_folder_below_a_file_is_refused_first(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    below = str(file / "a" / "b")
    with pytest.raises(ValueError, match=r"report: expected a folder that can be made"):
        evaluate._main(["no_checkpoint", "no_shards", "--report", below])
    with pytest.raises(ValueError, match="expected a folder that can be written"):
        export._main(["no_checkpoint", below])
    outputs.check_folder(tmp_path / "a" / "b", option="report")


def test_what_can_be_written_is_not_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs.check_file("", option="json")
    outputs.check_file(None, option="json")
    outputs.check_plot(tmp_path / "a.PNG")
    monkeypatch.chdir(tmp_path)
    outputs.check_file("plain.json", option="json")
    (tmp_path / "locked.json").touch()
    monkeypatch.setattr(outputs.os, "access", lambda *_: False)
    with pytest.raises(ValueError, match="where nothing may be written"):
        outputs.check_file("locked.json", option="json")
