"""Write a run as JSON, read it back, and flatten it for a table of runs."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from pipelines.config.compatibility import RENAMED
from pipelines.config.data import Augment, Data
from pipelines.config.evaluation import Validation
from pipelines.config.optim import Optim, Schedule
from pipelines.config.run import Model, Probe, Run, Scale
from sovit import Pooling


def to_json(run: Run) -> str:
    """Write a run as JSON that `from_json` reads back to an equal run."""
    return json.dumps(dataclasses.asdict(run), indent=2, sort_keys=True)


def from_json(text: str) -> Run:
    """Read a run back; ValueError names what this version does not know."""
    try:
        raw = tuples(json.loads(text))
        _take_new_names(raw)
        model = raw.pop("model")
        pooling = model.pop("pooling")
        optim = raw.pop("optim")
        data = raw.pop("data")
        # A flag of earlier versions for what is so by default now.
        if data.pop("deterministic", False):
            data["hw_decoder_load"] = 0.0
        # Runs of earlier versions have none of the three.
        schedule = Schedule(**optim.pop("schedule", {}))
        return Run(
            model=Model(**model, pooling=Pooling(**pooling) if pooling else None),
            data=Data(**data),
            optim=Optim(**optim, schedule=schedule),
            probe=Probe(**raw.pop("probe", {})),
            validation=Validation(**raw.pop("validation", {})),
            augment=Augment(**raw.pop("augment")),
            scale=Scale(**raw.pop("scale")),
            **raw,
        )
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"expected a run as this version writes it, got one where {error}; read it "
            "with the version that wrote it"
        ) from error


def _take_new_names(raw: dict[str, Any]) -> None:
    for new, former in RENAMED.items():
        group, _, name = former.rpartition(".")
        fields = raw.get(group, {}) if group else raw
        if name in fields:
            fields[new.rpartition(".")[2]] = fields.pop(name)


def tuples(value: Any) -> Any:
    """Convert JSON's lists back into the tuples that the dataclasses have."""
    if isinstance(value, dict):
        return {name: tuples(item) for name, item in value.items()}
    return tuple(tuples(item) for item in value) if isinstance(value, list) else value


def flat_params(run: Run) -> dict[str, Any]:
    """Flatten a run to dotted names; the pooling's stand without `model.` in front.

    People look for `pooling.power` when they compare runs.
    """
    flat: dict[str, Any] = {}
    _flatten(dataclasses.asdict(run), prefix="", out=flat)
    return {
        name.removeprefix("model.") if name.startswith("model.pooling") else name: value
        for name, value in flat.items()
    }


def _flatten(value: Any, *, prefix: str, out: dict[str, Any]) -> None:
    if isinstance(value, dict):
        for name, item in value.items():
            _flatten(item, prefix=f"{prefix}.{name}" if prefix else name, out=out)
    else:
        out[prefix] = value
