"""Build the saved view in which MLflow's page shows a sweep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_NUM_RUNS = 100
_MADE = {"deleted": False, "isGenerated": False}


def view_state(parent_id: str, *, fields: Sequence[str], metric: str) -> dict[str, Any]:
    """Build the state of a view of all runs below a parent, the best first."""
    return {
        "searchFilter": f"tags.`mlflow.parentRunId` = '{parent_id}'",
        "orderByKey": f"metrics.`{metric}`",
        "orderByAsc": False,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        # Else all but ten runs are hidden.
        "runsHiddenMode": "SHOW_ALL",
        "isAccordionReordered": True,
        "selectedColumns": [
            f"metrics.`{metric}`",
            *(f"params.`{field}`" for field in fields),
        ],
        "compareRunSections": [
            _section("sweep", name="Sweep", num_columns=1, height=420),
            _section("one", name="By one field", num_columns=3, height=320),
        ],
        "compareRunCharts": [
            {
                **_chart("parallel", kind="PARALLEL", section="sweep"),
                "selectedParams": list(fields),
                "selectedMetrics": [metric],
                "showAllRuns": True,
            },
            *(
                {
                    **_chart(f"scatter{place}", kind="SCATTER", section="one"),
                    "xaxis": {"key": field, "type": "PARAM"},
                    "yaxis": {"key": metric, "type": "METRIC"},
                }
                for place, field in enumerate(fields)
            ),
        ],
    }


def _section(
    key: str, *, name: str, num_columns: int, height: int
) -> Mapping[str, Any]:
    shape = {"columns": num_columns, "cardHeight": height}
    return {"uuid": key, "name": name, "display": True, "isReordered": True} | (
        _MADE | shape
    )


def _chart(key: str, *, kind: str, section: str) -> Mapping[str, Any]:
    place = {"uuid": key, "type": kind, "metricSectionId": section}
    return place | _MADE | {"runsCountToCompare": _NUM_RUNS}
