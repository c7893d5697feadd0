"""Runs are compared: seeds as one row, only what differs, foreign text as text."""

from __future__ import annotations

import csv
import dataclasses
import math
import re
import statistics
import sys
from collections.abc import Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from pipelines import tracking
from pipelines.config import Model
from pipelines.results.compare import Comparison, Options, as_page, compare, main
from pipelines.results.rows import ComparedRun
from pipelines.tracking.sweeps import KIND_TAG, OUTCOME_TAG, PARENT_TAG, SWEEP_KIND
from tests.browser import find_browser, open_page
from tests.stored_runs import RUN, keep_run

# One process makes the store: MLflow takes seconds for it.

PUBLISHED = 78.0
EVIL = '<script>document.title="taken"</script> & $x^2$ \x1b[31m"red"'
SEEDS = {1: (20.0, 70.0, 69.0), 2: (30.0, 71.0, 72.0), 3: (25.0, 69.0, 72.0)}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    uri = tracking.default_uri(str(tmp_path_factory.mktemp("storage")))
    paper = dataclasses.replace(RUN, published_top1=PUBLISHED)
    for seed, top1 in SEEDS.items():
        keep_run(
            uri,
            f"seed-{seed}",
            top1=top1,
            run=dataclasses.replace(paper, storage=f"runs/{seed}"),
            seed=seed,
            rates=(1.0, 900.0, 1000.0 + seed),
            num_workers=4,
            metrics={"train/peak_memory_mb": 100.0 * seed},
        )
    other = dataclasses.replace(RUN, model=Model(name="resnet50"))
    keep_run(uri, EVIL, top1=(40.0, 60.0), run=other, num_params=11_000_000)
    keep_run(uri, "failed", top1=(10.0,), run=paper, status="FAILED")
    keep_run(uri, "diverged", top1=(9.0, math.nan), run=paper, status="FAILED")
    keep_run(uri, "nothing-yet", run=paper, status="")
    sweep = keep_run(uri, "sweep", tags={KIND_TAG: SWEEP_KIND})
    for at, outcome in enumerate(("finished", "stopped")):
        tags = {PARENT_TAG: sweep, OUTCOME_TAG: outcome}
        top1 = (30.0 + at, 50.0 + at)[: 2 - at]
        keep_run(uri, f"trial-{at}", top1=top1, power=0.3 + at / 10, tags=tags)
    return uri


def _compare(store: str, *names: str, **options: Any) -> Comparison:
    return compare(Options(runs=names, store=store, **options))


def _cells(comparison: Comparison, name: str) -> list[str]:
    return list(comparison.table.texts[name])


def test_seeds_are_one_row_with_mean_and_sample_deviation(store: str) -> None:
    found = _compare(store, "seed-1", "seed-2", "seed-3", "trial-0")
    assert [len(row.runs) for row in found.table.rows] == [3, 1]
    final = [top1[-1] for top1 in SEEDS.values()]
    mean, deviation = statistics.mean(final), statistics.stdev(final)
    expected = {
        "name": "seed-1 +2",
        "n": "3",
        "epochs": "3/5",
        "final": f"{mean:.2f} ± {deviation:.2f}",
        "best": "71.33 ± 1.15 @ 2-3",
        "published": "78.00",
        "diff": f"{mean - PUBLISHED:+.2f}",
        "images/s": "951 ± 0",
        "params": "25.00 M",
        "peak MB": "200",
    }
    assert {name: _cells(found, name)[0] for name in expected} == expected
    row = found.table.rows[0]
    hours, of_devices = (
        row.spread(ComparedRun.hours),
        row.spread(ComparedRun.device_hours),
    )
    assert hours is not None
    assert of_devices is not None
    assert hours.mean > 0
    assert of_devices.mean == pytest.approx(4 * hours.mean)


def test_each_gives_every_run_a_row_and_shows_its_seed(store: str) -> None:
    found = _compare(store, "seed-1", "seed-3", each=True)
    assert len(found.table.rows) == 2
    assert set(_cells(found, "seed")) == {"1", "3"}


def test_settings_are_shown_only_where_they_differ(store: str) -> None:
    def params(*names: str) -> set[str]:
        return set(_compare(store, *names).table.params)

    assert params("seed-1", "seed-2") == set()
    assert params("sweep") == {"pooling.power"}
    # Workers are no part of what is learnt, and explain what a run costs.
    assert params("seed-1", "trial-0") == {"pooling.power", "num_workers"}


def test_what_ended_otherwise_is_another_row(store: str) -> None:
    found = _compare(store, "seed-1", "failed", "diverged", "nothing-yet")
    states = dict(zip(_cells(found, "name"), _cells(found, "state"), strict=True))
    assert states == {
        "seed-1": "finished",
        "failed +1": "failed",
        "nothing-yet": "running",
    }
    assert _cells(found, "final") == ["69.00", "nan ± nan", "-"]
    assert "state" not in _compare(store, "seed-1").table.texts
    assert _cells(_compare(store, "sweep"), "state") == ["finished", "stopped"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ["seed-1 +2", "trial-0", "trial-1"]),
        ({"reverse": True}, ["trial-1", "trial-0", "seed-1 +2"]),
        ({"sort": "pooling.power"}, ["trial-0", "trial-1", "seed-1 +2"]),
        ({"metric": "val/loss"}, ["seed-1 +2", "trial-0", "trial-1"]),
        (
            {"metric": "val/loss", "mode": "max"},
            ["trial-1", "trial-0", "seed-1 +2"],
        ),
        ({"sort": "name", "reverse": True}, ["trial-1", "trial-0", "seed-1 +2"]),
    ],
)
def test_rows_are_sorted_by_a_column(
    store: str, options: Mapping[str, Any], expected: list[str]
) -> None:
    found = _compare(
        store, "trial-1", "trial-0", "seed-1", "seed-2", "seed-3", **options
    )
    assert _cells(found, "name") == expected


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"sort": "speed"}, "sort: expected a column, got 'speed'; there are name, n"),
        ({"metric": "val/top2"}, "metric: expected one that a run has, got 'val/top2'"),
        ({"runs": ()}, "expected runs to compare, got none"),
        ({"plot": "a.gif"}, "plot: expected a file that ends in .png"),
        ({"html": "no/such/folder/a.html"}, "html: expected a file in a folder"),
        ({"runs": ("seed-9",)}, "got 'seed-9'; there are seed-"),
    ],
)
def test_what_cannot_be_done_is_said(
    store: str, options: Mapping[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        compare(Options(**{"runs": ("seed-1",), "store": store, **options}))


def _run_command(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    *arguments: str,
) -> str:
    monkeypatch.setattr(sys, "argv", ["sovit-compare", *arguments])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("width", [60, 100, 400])
def test_the_terminals_table_fits_and_obeys_no_name(
    store: str,
    width: int,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    said = _run_command(
        capsys, monkeypatch, "experiment:tests", "--store", store, "--sort", "n"
    )
    lines = said.splitlines()
    assert max(map(len, lines[1:])) <= width
    assert "\x1b" not in said
    num_rows, num_blocks = 6, sum("#" in line.split() for line in lines)
    assert len(lines) == 2 + num_blocks * (1 + num_rows) + num_blocks - 1
    assert num_blocks == 1 if width == 400 else num_blocks > 1
    assert "▁" in said


def test_files_hold_the_comparison(
    store: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = ["seed-1", "seed-2", "seed-3", EVIL]
    files = {kind: tmp_path / f"found.{kind}" for kind in ("csv", "html", "png")}
    said = _run_command(
        capsys,
        monkeypatch,
        *names,
        "--store",
        store,
        *("--csv", str(files["csv"])),
        *("--html", str(files["html"])),
        *("--plot", str(files["png"])),
    )
    assert all(str(file) in said for file in files.values())
    assert files["png"].read_bytes().startswith(b"\x89PNG")
    with files["csv"].open(newline="", encoding="utf-8") as file:
        first, second = csv.DictReader(file)
    assert float(first["final"]) == 71.0
    assert float(first["final deviation"]) == pytest.approx(math.sqrt(3))
    assert len(first["run_ids"].split()) == 3
    assert (second["name"], second["final deviation"]) == (EVIL, "")


class _Elements(HTMLParser):
    """Collect what a page holds: tags, texts of cells and titles, and addresses."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.texts: list[str] = []
        self.addresses: list[str] = []
        self.feed(page)

    def handle_starttag(
        self, tag: str, attrs: Sequence[tuple[str, str | None]]
    ) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if "href" in name]
        self.addresses += [value or "" for name, value in attrs if name == "src"]

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_a_page_stands_alone_and_shows_foreign_text_as_text(store: str) -> None:
    comparison = _compare(store, "experiment:tests")
    page = as_page(comparison)
    found = _Elements(page)
    assert found.tags.count("script") == 1
    assert found.tags.count("svg") == 3
    assert found.tags.count("tr") == 1 + len(comparison.table.rows)
    assert EVIL in found.texts
    assert "<b>all" not in page
    assert "lost &lt;b&gt;all&lt;/b&gt; workers" in page
    # Matplotlib's own references within an SVG are all there is.
    assert all(address.startswith("#") for address in found.addresses)


def test_runs_without_any_epoch_give_a_page_without_charts(store: str) -> None:
    page = as_page(_compare(store, "nothing-yet"))
    assert "<figure>" not in page
    assert "nothing-yet" in page


@pytest.mark.skipif(find_browser() is None, reason="needs chromium and chromedriver")
def test_a_click_sorts_the_page_and_no_name_runs(store: str, tmp_path: Path) -> None:
    from selenium.webdriver.common.by import By

    path = tmp_path / "page.html"
    path.write_text(as_page(_compare(store, "experiment:tests")), encoding="utf-8")
    with open_page(path.as_uri(), wait_for="svg") as page:
        assert page.title.startswith("Runs compared")
        heads = page.find_elements(By.CSS_SELECTOR, "thead th")
        at = [head.text for head in heads].index("final")

        def finals() -> list[str]:
            rows = page.find_elements(By.CSS_SELECTOR, "tbody tr")
            return [
                row.find_elements(By.CSS_SELECTOR, "td, th")[at].text for row in rows
            ]

        rising = ["31.00", "50.00", "60.00", "71.00 ± 1.73", "nan ± nan", "-"]
        heads[at].find_element(By.TAG_NAME, "button").click()
        assert [text for text in finals() if text not in rising[-2:]] == rising[:-2]
        heads[at].find_element(By.TAG_NAME, "button").click()
        falling = finals()
        assert falling[:4] == rising[3::-1]
        assert set(falling[4:]) == {"nan ± nan", "-"}, "what has no value comes last"
        assert heads[at].get_attribute("aria-sort") == "descending"
