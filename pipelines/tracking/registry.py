"""Register each run's model under its recipe; the alias `best` marks the best.

`models:/RECIPE@best` is then what `mlflow.pyfunc.load_model` takes. As for runs,
nothing of MLflow stops a training: what fails is warned of, and the model stays as it
is logged.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING

from pipelines.tracking.client import attempt

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

BEST = "best"
RUN_TAG, SCORE_TAG = "run_id", "val/top1"
_MAX_NAME_CHARS = 200
_BAD_NAME_CHARS = re.compile(r"[^\w\-. ]", re.ASCII)
_VERSIONS_AT_ONCE = 200


def register_model(
    uri: str, address: str, *, name: str, run_id: str, top1: float
) -> str:
    """Register a logged model as a new version, and update the alias `best`.

    `best` names the version with the highest `top1` in its tag, of equal ones the
    oldest; NaN is never the best.

    Args:
        address: What `log_model` returned, `models:/m-...`; "" registers nothing.
        name: The recipe's name; what MLflow refuses in one becomes `_`.

    Returns the version's address, `models:/NAME/VERSION`, or "" where there is none.
    """
    if not address:
        return ""
    registered = registered_name(name)

    def register(client: MlflowClient) -> str:
        _make_room(client, name=registered)
        model = client.get_logged_model(address.removeprefix("models:/"))
        # By where its files lie: for an address MLflow would ask the store that the
        # environment names, not this one.
        version = client.create_model_version(
            registered,
            source=model.artifact_location,
            run_id=run_id,
            model_id=model.model_id,
            tags={RUN_TAG: run_id, SCORE_TAG: repr(float(top1))},
            await_creation_for=0,
        )
        _point_to_best(client, name=registered)
        return f"models:/{registered}/{version.version}"

    return attempt(
        register, uri=uri, otherwise="", loss=f"no version of model {registered}"
    )


def registered_name(recipe: str) -> str:
    """Convert a recipe's name to one that MLflow accepts for a registered model."""
    name = _BAD_NAME_CHARS.sub("_", recipe).strip(". ")
    return name[:_MAX_NAME_CHARS].rstrip(". ") or "model"


def _make_room(client: MlflowClient, *, name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _point_to_best(client: MlflowClient, *, name: str) -> None:
    """Set the alias until it is right: runs may register concurrently."""
    named = ""
    while (best := _best(_versions(client, name=name))) not in ("", named):
        client.set_registered_model_alias(name, BEST, best)
        named = best


def _best(versions: list[ModelVersion]) -> str:
    """Return the version with the highest score in its tag; "" if none has one."""
    scored = [
        (top1, -int(version.version))
        for version in versions
        if math.isfinite(top1 := _score(version))
    ]
    return str(-max(scored)[1]) if scored else ""


def _score(version: ModelVersion) -> float:
    try:
        return float(version.tags.get(SCORE_TAG, "nan"))
    except ValueError:
        return math.nan


def _versions(client: MlflowClient, *, name: str) -> list[ModelVersion]:
    found: list[ModelVersion] = []
    token: str | None = None
    while True:
        page = client.search_model_versions(
            f"name='{name}'", max_results=_VERSIONS_AT_ONCE, page_token=token
        )
        found += page
        token = page.token
        if not token:
            return found
