"""The dashboard for Grafana asks for metrics that exist, and each of them is explained.

That Prometheus answers each expression was tried by hand: see docs/watching.md.
"""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.driver.prometheus import GAUGES

ROOT = Path(__file__).parents[1]
DASHBOARD: dict[str, Any] = json.loads((ROOT / "clusters/grafana.json").read_text())
PANELS: list[dict[str, Any]] = DASHBOARD["panels"]
DOCS = (ROOT / "docs/watching.md").read_text()
# Functions and words of Prometheus that the dashboard and the alarms use.
WORDS = {"sum", "min", "count", "delta", "by", "instance", "N"}
# Ray's gauges of nodes and clusters, and panels that use what its C++ side exports.
RAY_SOURCES = (
    "dashboard/modules/reporter/reporter_agent.py",
    "dashboard/modules/metrics/dashboards/default_dashboard_panels.py",
)


def ray_folder() -> Path:
    """Find the installed Ray without importing it."""
    spec = importlib.util.find_spec("ray")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def names_in(expression: str) -> set[str]:
    """Name the metrics of an expression."""
    bare = re.sub(r"\{[^}]*\}|\[[^\]]*\]", "", expression)
    return set(re.findall(r"[A-Za-z_:][\w:]*", bare)) - WORDS


def exists(metric: str) -> bool:
    """Tell whether we or Ray export a metric."""
    name = metric.removeprefix("ray_")
    if name == metric:
        return False
    if name in GAUGES:
        return True
    texts = [(ray_folder() / source).read_text() for source in RAY_SOURCES]
    return f'"{name}": Gauge(' in texts[0] or bool(
        re.search(rf"\b{metric}\b", texts[1])
    )


def expressions() -> list[str]:
    return [target["expr"] for panel in PANELS for target in panel["targets"]]


def on_panels() -> set[str]:
    return {name for expression in expressions() for name in names_in(expression)}


def test_metrics_are_told_from_others() -> None:
    assert names_in('sum by (instance) (ray_a{x="y"}) / ray_b * 2') == {
        "ray_a",
        "ray_b",
    }
    assert exists("ray_sovit_step")
    assert exists("ray_node_cpu_count")
    assert exists("ray_object_store_memory")
    for wrong in ("ray_sovit_steps", "sovit_step", "ray_node_cpu", "node_cpu_count"):
        assert not exists(wrong), wrong


@pytest.mark.parametrize("expression", expressions())
def test_every_expression_asks_for_metrics_that_exist(expression: str) -> None:
    names = names_in(expression)
    assert names
    assert [name for name in names if not exists(name)] == []
    if names & {f"ray_{name}" for name in GAUGES}:
        assert 'run=~"$run"' in expression, "the choice of runs at the top"


def test_every_metric_of_ours_is_on_a_panel() -> None:
    assert {f"ray_{name}" for name in GAUGES} <= on_panels()


def explanations() -> list[tuple[set[str], list[str]]]:
    """Give the metrics and the panels of each point: - `a`, `b`, *Panel*. Text."""
    points = re.findall(r"^- (`ray_.*?)\*\. ", DOCS.replace("\n  ", " "), flags=re.M)
    assert points
    return [
        (set(re.findall(r"`(ray_\w+)", names)), panels.split(", "))
        for names, _, panels in (point.partition(", *") for point in points)
    ]


def test_every_metric_is_explained_and_nothing_else() -> None:
    explained = {name for names, _ in explanations() for name in names}
    assert explained == on_panels()
    mentioned = set(re.findall(r"\b(ray_(?:sovit|node|cluster)_\w+)", DOCS))
    assert [name for name in mentioned if not exists(name)] == []


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_every_panel_is_in_the_text_with_its_metrics(panel: dict[str, Any]) -> None:
    wanted = {name for at in panel["targets"] for name in names_in(at["expr"])}
    points = [names for names, panels in explanations() if panel["title"] in panels]
    assert points
    assert wanted == {name for names in points for name in names} & wanted


def test_panels_are_whole() -> None:
    ids = [panel["id"] for panel in PANELS]
    assert len(set(ids)) == len(ids)
    titles = [panel["title"] for panel in PANELS]
    assert len(set(titles)) == len(titles)
    source = {"type": "prometheus", "uid": "${datasource}"}
    for panel in PANELS:
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert len(panel["description"]) > 15, panel["title"]
        assert panel["datasource"] == source
        references = [target["refId"] for target in panel["targets"]]
        assert references == sorted(set(references)) != []
        for target in panel["targets"]:
            assert target["datasource"] == source
            assert target["legendFormat"]


def test_panels_do_not_lie_on_each_other() -> None:
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in PANELS)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24  # Grafana's columns


def test_data_source_and_runs_are_chosen_at_the_top() -> None:
    assert DASHBOARD["schemaVersion"] >= 36, "Grafana 10 and newer"
    source, run = DASHBOARD["templating"]["list"]
    assert (source["name"], source["type"]) == ("datasource", "datasource")
    assert source["query"] == "prometheus"
    assert (run["name"], run["type"], run["multi"]) == ("run", "query", True)
    found = re.fullmatch(r"label_values\((\w+), run\)", run["query"]["query"])
    assert found is not None
    assert exists(found[1])


def test_labels_of_the_machines_are_rays() -> None:
    text = (ray_folder() / RAY_SOURCES[0]).read_text()
    legends = " ".join(
        target["legendFormat"] for panel in PANELS for target in panel["targets"]
    )
    used = set(re.findall(r"\{\{(\w+)\}\}", legends))
    assert used == {"run", "ip", "GpuIndex", "instance"}
    assert 'node_tags = {"ip": ip' in text
    assert '"GpuIndex": str(gpu_index)' in text


def test_prometheus_reads_the_list_that_ray_writes() -> None:
    config = yaml.safe_load((ROOT / "clusters/prometheus.yml").read_text())
    (job,) = config["scrape_configs"]
    (found,) = job["file_sd_configs"]
    constants = (ray_folder() / "_private/ray_constants.py").read_text()
    file = re.search(r'PROMETHEUS_SERVICE_DISCOVERY_FILE = "(.*)"', constants)
    latest = re.search(r'SESSION_LATEST = "(.*)"', constants)
    assert file is not None
    assert latest is not None
    assert found["files"] == [f"/tmp/ray/{latest[1]}/{file[1]}"]
