"""MLflow's own page compares a sweep's trials as it opens, with nothing to choose."""

from __future__ import annotations

import dataclasses
import io
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import numpy as np
import pytest
from PIL import Image

from pipelines import tracking
from pipelines.config.serialization import flat_params
from pipelines.tracking.sweeps import NUM_PARAMS
from recipes.demo import demo
from tests.browser import find_browser, mlflow_server, open_page

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

pytest.importorskip("selenium", reason="the page is opened by selenium")
pytestmark = [
    pytest.mark.skipif(
        find_browser() is None, reason="needs chromium, chromium-driver"
    ),
]

CLOSE_S = 60.0
STEPS_PER_EPOCH = 40
SEARCHED = ("pooling.num_iterations", "pooling.power", "pooling.reduced_dim")
# Each trial's values of these three, and what it came to; the last one failed.
TRIALS = (
    (1, 0.3, 24, 61.5),
    (3, 0.5, 24, 66.25),
    (7, 0.5, 48, 68.5),
    (5, 0.7, 48, 64.75),
    (5, 0.45, 32, 70.125),
    (7, 0.6, 32, None),
)
AXES = """const plot = document.querySelector('.parcoords').closest('.js-plotly-plot');
return plot.data[0].dimensions"""
LABELS = """return [...document.querySelectorAll('.parcoords .axis-title')]
    .map(label => label.textContent)"""
# Where the lines are: between the first axis and the last.
LINES = """const axes = [...document.querySelectorAll('.parcoords .axis .domain')]
    .map(axis => axis.getBoundingClientRect());
return [axes[0].right + 2, axes[0].top, axes.at(-1).left - 2, axes[0].bottom]"""


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Hold where a recorded sweep is shown."""

    address: str
    experiment_id: str
    trial_ids: tuple[str, ...]

    @property
    def url(self) -> str:
        """Give the address of MLflow's page that compares the trials."""
        runs, experiments = (
            quote(json.dumps(ids, separators=(",", ":")), safe="[],")
            for ids in (self.trial_ids, [self.experiment_id])
        )
        return f"{self.address}/#/compare-runs?runs={runs}&experiments={experiments}"


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sweep]:
    """Serve a store that holds a sweep of six trials, the last of them failed."""
    from mlflow import MlflowClient

    folder = tmp_path_factory.mktemp("page")
    # Into the file, not through the server: a busy machine may take its time.
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    parent_id = _open(uri, name="sweep")
    trial_ids = tuple(
        _record(uri, f"sweep-{index}", values=values, parent_id=parent_id)
        for index, values in enumerate(TRIALS)
    )
    tracking.end_run(uri, parent_id, status="FINISHED")
    experiment_id = MlflowClient(uri).get_run(parent_id).info.experiment_id
    with mlflow_server(uri, folder=folder) as address:
        yield Sweep(address, experiment_id, trial_ids)


@pytest.fixture(scope="module")
def page(sweep: Sweep) -> Iterator[Chrome]:
    """Open the page that compares the trials, as it comes."""
    with open_page(sweep.url, wait_for=".parcoords .axis-title") as page:
        yield page


def _open(uri: str, *, name: str, params: Any = None, **tags: str) -> str:
    run_id = tracking.open_run(
        uri, experiment="demo", name=name, params=params or {}, tags=tags
    )
    assert run_id, "MLflow didn't take the run"
    return run_id


def _record(uri: str, name: str, *, values: Any, parent_id: str) -> str:
    """Record a trial as a training does; without an accuracy it fails at once."""
    num_iterations, power, reduced_dim, top1 = values
    run = demo()
    assert run.model.pooling is not None
    pooling = dataclasses.replace(
        run.model.pooling,
        num_iterations=num_iterations,
        power=power,
        reduced_dim=reduced_dim,
    )
    run = dataclasses.replace(
        run, model=dataclasses.replace(run.model, pooling=pooling)
    )
    parent = {"mlflow.parentRunId": parent_id}
    # As a training counts it: the reduced dimension changes it too.
    size = {NUM_PARAMS: 900_000 + 1_000 * (reduced_dim or 0)}
    run_id = _open(uri, name=name, params=flat_params(run) | size, **parent)
    writer = tracking.MetricWriter(uri, run_id)
    # The page draws one metric, the first that a run has ever got and all runs share.
    writer.log({"val/top1": math.nan}, step=0)
    for epoch in range(1, 4 if top1 else 1):
        _write_epoch(writer, epoch=epoch, top1=top1 * epoch / 3)
    assert writer.close(CLOSE_S) == 0
    tracking.end_run(uri, run_id, status="FINISHED" if top1 else "FAILED")
    return run_id


def _write_epoch(writer: tracking.MetricWriter, *, epoch: int, top1: float) -> None:
    step = epoch * STEPS_PER_EPOCH
    trained = {"loss": 2.0 / epoch, "top1": 0.9 * top1, "images_per_s": 900.0}
    trained |= {"waiting_share": 0.1, "lr": 2e-3, "bad_images": 0.0}
    writer.log({f"train/{key}": trained[key] for key in trained}, step=step)
    held_out = {"loss": 1.5 / epoch, "top1": top1, "top5": 99.0}
    held_out |= {"num_images": 2000.0, "bad_images": 0.0}
    measured = {f"val/{key}": held_out[key] for key in held_out}
    writer.log(measured | {"epoch": float(epoch)}, step=step)


def test_the_page_shows_what_was_searched_and_the_accuracy(page: Chrome) -> None:
    assert page.execute_script(LABELS) == [*SEARCHED, "val/top1"]


def test_the_page_has_a_line_for_each_trial(page: Chrome) -> None:
    axes = {axis["label"]: axis["values"] for axis in page.execute_script(AXES)}
    for index, name in enumerate(SEARCHED):
        assert axes[name] == [values[index] for values in TRIALS], name
    assert axes["val/top1"] == [values[3] for values in TRIALS]


def test_the_lines_are_drawn_in_their_colours(page: Chrome, tmp_path: Path) -> None:
    shot = Image.open(io.BytesIO(page.get_screenshot_as_png())).convert("HSV")
    shot.convert("RGB").save(tmp_path / "page.png")
    assert shot.size == (1400, 900)
    left, top, right, bottom = page.execute_script(LINES)
    between = shot.crop((left, top, right, bottom))
    # Axes, their numbers and the page are grey; lines that nothing colours are alike.
    hue, depth, _ = np.moveaxis(np.asarray(between), -1, 0)
    hues = hue[depth > 100]
    assert hues.size > 500
    assert len(np.unique(hues // 32)) > 2
