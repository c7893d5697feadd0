"""Go on with a run by its name, and only as the run that it was."""

from __future__ import annotations

from pipelines.config import Run
from pipelines.not_learnt import NOT_LEARNT, NOT_LEARNT_GROUPS
from pipelines.recipe import load_recipe
from pipelines.runfile import flat_params
from pipelines.runs import Record, find_record, read_record


def record_to_resume(name: str, *, storage: str, recipe: str) -> Record | None:
    """Find a run to go on with; None where its recipe is to begin it.

    Raises ValueError where there is none and no recipe, and where it has finished.
    """
    storage = storage or (load_recipe(recipe).storage if recipe else "runs")
    if recipe and find_record(storage, name=name) is None:
        return None
    return read_record(storage, name=name)


def check_same(before: Run, now: Run) -> None:
    """Raise ValueError where a run is to go on with settings that change it."""
    was, params = flat_params(before), flat_params(now)
    changed = [
        name
        for name in sorted(params.keys() | was.keys())
        if params.get(name) != was.get(name)
        and name not in NOT_LEARNT
        and not name.startswith(NOT_LEARNT_GROUPS)
    ]
    if changed:
        raise ValueError(
            f"wanted the settings that the run began with, came others for "
            f"{', '.join(changed)}; leave them out, or start a new run"
        )
    if before.scale.is_alone != now.scale.is_alone:
        raise ValueError(
            "scale.num_workers: wanted 0 again for a run that began so, and at least "
            f"1 for one that did not, came {now.scale.num_workers} after "
            f"{before.scale.num_workers}; leave it out, or start a new run"
        )
