"""`python -m recipes` sets each recipe's published accuracy beside the measured one."""

from __future__ import annotations

import dataclasses
import json
import runpy
import sys
from pathlib import Path
from typing import Any, Literal

import pytest

from pipelines import tracking
from pipelines.config.recipes import load_recipe
from pipelines.config.serialization import flat_params
from pipelines.results import scoreboard as command
from pipelines.results.best_runs import Best
from pipelines.results.recipe_rows import Row, Size, list_rows, with_sizes
from pipelines.results.recipe_table import OTHER_NOTE, as_json, as_markdown, as_text
from pipelines.results.scoreboard import Options, scoreboard
from pipelines.tracking.sweeps import log_metrics

ROOT = Path(__file__).parents[1]
SEVEN = ("so_vit_7", "so_vit_10", "so_vit_14", "so_vit_19")
SEVEN += ("sot_tiny", "sot_small", "sot_base")


def names(*wanted: str) -> list[str]:
    return [row.recipe for row in list_rows(wanted)]


def test_all_seven_models_are_listed_with_what_was_published() -> None:
    rows = list_rows(["imagenet"])
    assert tuple(row.name for row in rows) == SEVEN
    published = [row.run.published_top1 for row in rows]
    assert published == [76.8, 78.7, 82.3, 82.8, 80.3, 82.7, 83.5]
    assert {row.num_classes for row in rows} == {1000}


def test_recipes_are_chosen_by_module_or_by_a_part_of_their_names() -> None:
    everything = names()
    assert len(everything) == len(set(everything)) > 60
    assert names("gcp", "demo") == [
        name for name in everything if name.startswith(("gcp.", "demo."))
    ]
    birds = names("BIRDS")
    assert birds == [name for name in everything if name.endswith("_birds")]
    assert len(birds) == 4
    with pytest.raises(ValueError, match=r"'nope', .* modules attention, .*imagenet"):
        list_rows(["demo", "nope"])


def test_classes_are_those_of_the_shards_or_of_the_sets_name() -> None:
    found = {row.recipe: row.num_classes for row in list_rows()}
    assert found["demo.demo"] == 10
    assert found["finetune.isqrt_resnet50_birds"] == 200
    assert found["finetune.isqrt_vgg16_cars"] == 196
    assert found["finetune.mpncov_resnet50_aircraft"] == 100
    assert found["gcp.isqrt_resnet50"] == 1000


def test_a_network_is_counted_once_for_all_its_recipes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from pipelines.results import recipe_rows as module

    built = []
    monkeypatch.setattr(
        module, "_size", lambda model, num_classes: built.append(num_classes) or 1
    )
    with_sizes(list_rows(["resnet18_gap"]))
    assert built == [1000]
    with_sizes(list_rows(["isqrt_resnet50_"]))
    assert sorted(built) == [100, 196, 200, 1000]


def board() -> list[Row]:
    first, second = list_rows(["so_vit_7", "demo"])
    best = Best(
        top1=86.5, name="mine", run_id="ab", has_other_settings=False, num_runs=2
    )
    other = dataclasses.replace(best, top1=70.0, has_other_settings=True, num_runs=1)
    size = Size(num_params=5_529_232, num_macs=1_417_262_336)
    return [
        dataclasses.replace(first, best=best),
        dataclasses.replace(second, best=other, size=size),
    ]


def test_the_table_is_aligned_and_grouped_and_marks_other_settings() -> None:
    heading, empty, module, demo, _, other, last, *rest = as_text(board()).splitlines()
    assert (empty, module, other) == ("", "demo", "imagenet")
    assert rest == ["", OTHER_NOTE]
    assert demo.split() == ["demo", "so_vit_7", "32", "86.50", "2"]
    assert last.split()[2:] == ["224", "5.53", "1.42", "76.80", "70.00*", "-6.80", "1"]
    for word, text in (("params M", "5.53"), ("published", "76.80"), ("diff", "-6.80")):
        assert heading.index(word) + len(word) == last.index(text) + len(text)
    assert len(heading) == len(last)


def test_markdown_has_a_table_for_each_module() -> None:
    text = as_markdown(board())
    lines = text.splitlines()
    assert [line for line in lines if line.startswith("## ")] == [
        "## demo",
        "## imagenet",
    ]
    tables = [line for line in lines if line.startswith("|")]
    assert len(tables) == 2 * 3
    for table in (tables[:3], tables[3:]):
        assert len({len(line) for line in table}) == 1
    assert len({line.count("|") for line in tables}) == 1
    assert lines[-1] == OTHER_NOTE


def test_json_has_whole_numbers_and_nulls() -> None:
    demo, so_vit = json.loads(as_json(board()))
    assert (demo["recipe"], demo["num_params"], demo["difference"]) == (
        "demo",
        None,
        None,
    )
    assert (demo["run"], demo["num_runs"], demo["measured_top1"]) == ("mine", 2, 86.5)
    assert (so_vit["num_params"], so_vit["num_macs"]) == (5_529_232, 1_417_262_336)
    assert so_vit["difference"] == pytest.approx(-6.8)
    assert so_vit["has_other_settings"]


def run_main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["recipes", *arguments])
    with pytest.raises(SystemExit) as caught:
        runpy.run_module("recipes", run_name="__main__", alter_sys=False)
    code = caught.value.code
    assert isinstance(code, int)
    return code


def test_a_finished_run_in_mlflow_fills_its_row(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    uri = tracking.default_uri(str(tmp_path))
    kept: list[tuple[float, Literal["FINISHED", "FAILED"]]]
    kept = [(86.25, "FINISHED"), (99.0, "FAILED")]
    for top1, status in kept:
        run_id = tracking.open_run(
            uri,
            experiment="tests",
            name=status.lower(),
            params=flat_params(load_recipe("demo")),
            tags={},
        )
        log_metrics(uri, run_id, metrics={"val/top1": top1})
        tracking.end_run(uri, run_id, status=status)
    arguments = ["demo", "so_vit_7", "--no-count", "--storage", str(tmp_path), "--json"]
    assert run_main(monkeypatch, *arguments) == 0
    demo, so_vit = json.loads(capsys.readouterr().out)
    assert (demo["measured_top1"], demo["num_runs"], demo["run"]) == (
        86.25,
        1,
        "finished",
    )
    assert not demo["has_other_settings"]
    assert so_vit["num_runs"] == 0


def test_without_a_store_the_column_is_empty_and_nothing_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_main(monkeypatch, "demo") == 0
    assert capsys.readouterr().out.split()[-5:] == [
        "demo",
        "so_vit_7",
        "32",
        "0.54",
        "0.0379",
    ]
    assert list(tmp_path.iterdir()) == []


def options(**settings: Any) -> Options:
    return Options(recipes=("demo",), count=False, **settings)


def test_a_store_that_was_named_and_is_away_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    uri = f"sqlite:///{tmp_path / 'none.db'}"
    for arguments in (["--tracking-uri", uri], ["--store", uri]):
        assert run_main(monkeypatch, "demo", "--no-count", *arguments) == 2
        said = capsys.readouterr().err
        assert said.startswith("python -m recipes: expected an MLflow store, got ")
        assert said.count("\n") == 1
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(ValueError, match=r"none\.db, no file"):
        scoreboard(options())
    with pytest.raises(ValueError, match="one of --markdown and --json"):
        options(markdown=True, json=True)


def test_an_address_with_a_secret_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def begin(_: object) -> None:
        raise AssertionError("the command has begun")

    monkeypatch.setattr(command, "_main", begin)
    code = run_main(monkeypatch, "--tracking-uri", "http://me:wJalr@mlflow.example")
    assert code == 2
    said = capsys.readouterr().err
    assert "argument 2 (--tracking-uri)" in said
    assert "wJalr" not in said


def test_the_page_holds_every_recipe_as_it_is() -> None:
    page = (ROOT / "docs" / "scoreboard.md").read_text()
    lines = [line.split("|")[1:-1] for line in page.splitlines()]
    written = {tuple(map(str.strip, cells)) for cells in lines if len(cells) == 9}
    rows = list_rows()
    named = {(cells[0], cells[1], cells[2], cells[5]) for cells in written}
    for row in rows:
        published = row.run.published_top1
        text = "" if published is None else f"{published:.2f}"
        model = row.run.model
        assert (row.name, model.name, str(model.img_size), text) in named
    sizes = {cells[0]: cells[3:5] for cells in written}
    for row in with_sizes(list_rows(["so_vit_7", "sot_tiny", "demo"])):
        assert row.size is not None
        assert f"{row.size.num_params / 1e6:.2f}" == sizes[row.name][0]
        assert row.size.num_macs / 1e9 == pytest.approx(
            float(sizes[row.name][1]), abs=0.01
        )
