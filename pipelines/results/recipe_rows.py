"""List the recipes, and count their networks' parameters and multiply-adds."""

from __future__ import annotations

import dataclasses
import importlib
import json
import pkgutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType, MappingProxyType

from pipelines.config import Model, Run
from pipelines.config.recipes import load_recipe, recipes_of
from pipelines.data.shard_set import CLASSES_FILE
from pipelines.results.best_runs import Best
from pipelines.training.model import (
    count_macs,
    count_parameters,
    shapes_of,
    without_weights,
)

# Of sets that are not here, by the name that their address holds.
_NUM_CLASSES = MappingProxyType(
    {"imagenet": 1000, "birds": 200, "cars": 196, "aircraft": 100}
)
_USUAL_NUM_CLASSES = 1000


@dataclass(frozen=True, kw_only=True)
class Size:
    """A network's size at the recipe's image size."""

    num_params: int
    num_macs: int
    """Multiply-adds of one image."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A recipe with its network's size and its best run."""

    module: str
    name: str
    """Of the function."""
    run: Run
    num_classes: int
    size: Size | None = None
    """None if not counted."""
    best: Best | None = None
    """None if no run of it has finished."""

    @property
    def recipe(self) -> str:
        """The name that a training is started by."""
        return f"{self.module}.{self.name}"

    @property
    def difference(self) -> float | None:
        """Points by which the best run is above the published accuracy."""
        published = self.run.published_top1
        if self.best is None or published is None:
            return None
        return self.best.top1 - published


def list_rows(wanted: Sequence[str] = ()) -> list[Row]:
    """List the recipes by module, in their order in the source.

    Args:
        wanted: Modules, or parts of recipes' names; all if empty.

    Raises ValueError where one of them fits no recipe.
    """
    rows = list(_all_rows())
    modules = {row.module for row in rows}
    for name in wanted:
        if not any(_fits(row, name, modules=modules) for row in rows):
            raise ValueError(
                f"expected recipes, got {name!r}, which is part of no name; there are "
                f"modules {', '.join(sorted(modules))}"
            )
    if not wanted:
        return rows
    return [
        row for row in rows if any(_fits(row, name, modules=modules) for name in wanted)
    ]


def _all_rows() -> Iterator[Row]:
    package = importlib.import_module("recipes")
    for found in pkgutil.iter_modules(package.__path__):
        if found.name.startswith("_"):
            continue
        module = importlib.import_module(f"recipes.{found.name}")
        lines = {name: _line_of(getattr(module, name)) for name in recipes_of(module)}
        for name in sorted(lines, key=lines.__getitem__):
            run = load_recipe(f"{found.name}.{name}")
            yield Row(
                module=found.name,
                name=name,
                run=run,
                num_classes=_num_classes(run.data.train),
            )


def _line_of(function: FunctionType) -> int:
    return function.__code__.co_firstlineno


def _fits(row: Row, name: str, *, modules: set[str]) -> bool:
    # `gcp` is a module, and part of the name of another.
    return row.module == name if name in modules else name.lower() in row.recipe


def _num_classes(address: str) -> int:
    """Count a set's classes: from its shards if they are here, else by its name."""
    file = Path(address) / CLASSES_FILE
    if file.is_file():
        return len(json.loads(file.read_text()))
    named = (_NUM_CLASSES[part] for part in address.split("/") if part in _NUM_CLASSES)
    return next(named, _USUAL_NUM_CLASSES)


def with_sizes(rows: Sequence[Row]) -> list[Row]:
    """Count parameters and multiply-adds, once for each different network."""
    found: dict[str, Size] = {}
    counted = []
    for row in rows:
        settings = dataclasses.replace(without_weights(row.run.model), drop_path_rate=0)
        network = f"{row.num_classes} {json.dumps(dataclasses.asdict(settings))}"
        if network not in found:
            found[network] = _size(settings, num_classes=row.num_classes)
        counted.append(dataclasses.replace(row, size=found[network]))
    return counted


def _size(settings: Model, *, num_classes: int) -> Size:
    model = shapes_of(settings, num_classes=num_classes)
    return Size(
        num_params=count_parameters(model).num,
        num_macs=count_macs(model, img_size=settings.img_size),
    )
