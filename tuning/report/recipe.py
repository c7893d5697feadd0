"""Write the winner of a sweep as a recipe: Python source, ready to paste.

The source is laid out as `ruff format` does it, so that it can be kept as it is.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from pipelines.config.overrides import change_fields
from pipelines.config.own_code import OwnCode
from pipelines.config.recipes import load_recipe, own_run
from tuning.report.source import (
    INDENT,
    Group,
    Imports,
    Node,
    dict_items,
    docstring,
    import_lines,
    laid_out,
    literal,
    multi_line,
    string,
)
from tuning.report.table import value_of
from tuning.trials.ledger import Sweep, TrialRecord

FUNCTION = "best"
# Said by whoever trains, not by what was found; unless it was searched.
_LEFT_OUT = ("storage", "experiment", "num_checkpoints_to_keep", "seed")


def winner_recipe(sweep: Sweep, winner: TrialRecord) -> str:
    """Write a module with a function `best() -> Run`: the winner's run.

    It changes the recipe that the sweep started from in the fields that differ, save
    where runs are kept, how many checkpoints are, and the seed, unless they were
    searched. Paths of shards are absolute, and a recipe file of the user's own is in
    it whole: it trains from any folder.

    Raises ValueError where a recipe of ours is not there any more.
    """
    function = sweep.recipe.rpartition(":")[2]
    if sweep.code:
        before = own_run(sweep.code, function=function)
    else:
        before = load_recipe(sweep.recipe)
    kept = {
        name: getattr(before, name) for name in _LEFT_OUT if name not in winner.setting
    }
    now = dataclasses.replace(
        change_fields(sweep.run, winner.setting),
        recipe=f"{sweep.name}-{FUNCTION}",
        **kept,
    )
    imports: Imports = {("pipelines.config", "Run")}
    if sweep.code:
        imports.add(("pipelines.config.own_code", "OwnCode"))
        imports |= {
            ("pipelines.config.recipes", name) for name in ("load_code", "own_run")
        }
        start = f"own_run(CODE, function={string(function)})"
    else:
        start = _start(sweep.recipe, imports=imports)
    body = [f"run = {start}"]
    poolings = before.model.pooling, now.model.pooling
    if None not in poolings and poolings[0] != poolings[1]:
        body.append("assert run.model.pooling is not None")
    changed = _replaced(before, now, name="run", imports=imports)
    body.append("return " + _body_part(changed, used=len("return ")))
    return "\n".join(
        [
            *_header(sweep, winner),
            "",
            "from __future__ import annotations",
            "",
            "import dataclasses",
            "",
            *import_lines(imports),
            *(_code_lines(sweep.code) if sweep.code else []),
            "",
            "",
            f"def {FUNCTION}() -> Run:",
            *_says(sweep, winner),
            *(" " * INDENT + line for line in body),
            "",
        ]
    )


def _header(sweep: Sweep, winner: TrialRecord) -> list[str]:
    scale = sweep.run.scale
    workers = "1 worker" if scale.world_size == 1 else f"{scale.world_size} workers"
    return docstring(
        f"What the sweep {sweep.name} found best, as a recipe.",
        f"    sovit-train FILE.py:{FUNCTION}",
        f"Trial {winner.number}, {winner.status} after {winner.seconds / 3600:.2f} "
        f"hours on {workers} {'with' if scale.use_gpu else 'without'} a GPU.",
    )


def _says(sweep: Sweep, winner: TrialRecord) -> list[str]:
    metric = sweep.search.metric
    value = value_of(winner, metric)
    came = "no value" if value is None else f"{value:.6g}"
    return docstring(
        f"Train {sweep.recipe} as the sweep {sweep.name} found best.",
        f"{metric} was {came} in epoch {winner.epoch}.",
        indent=INDENT,
    )


def _start(recipe: str, *, imports: Imports) -> str:
    """Return the call of our recipe that the sweep began with."""
    module, _, function = recipe.partition(".")
    function = function or module
    is_taken = function in (FUNCTION, "run")  # names that `best` uses itself
    imports.add((f"recipes.{module}", f"{function} as start" if is_taken else function))
    return "start()" if is_taken else f"{function}()"


def _code_lines(code: OwnCode) -> list[str]:
    """Write out the user's own recipe file, which may register the model."""
    texts = code.sources.items()
    return [
        "",
        "CODE = OwnCode(",
        f"    origin={string(code.origin)},",
        "    sources={",
        *(f"        {string(name)}: {multi_line(text)}" for name, text in texts),
        "    },",
        ")",
        "load_code(CODE)",
    ]


def _body_part(node: Node, *, used: int) -> str:
    return laid_out(node, indent=INDENT, used=INDENT + used)


def _replaced(before: Any, now: Any, *, name: str, imports: Imports) -> Group:
    """Write `dataclasses.replace` with the fields that differ."""
    items: list[tuple[str, Node]] = [("", name)]
    for one in dataclasses.fields(before):
        was, new = getattr(before, one.name), getattr(now, one.name)
        if was == new:
            continue
        path = f"{name}.{one.name}"
        if dataclasses.is_dataclass(was) and type(was) is type(new):
            node: Node = _replaced(was, new, name=path, imports=imports)
        elif isinstance(was, dict) and set(was) <= set(new):
            node = _extended(was, new, name=path, imports=imports)
        else:
            node = literal(new, imports=imports)
        items.append((f"{one.name}=", node))
    return Group(opening="dataclasses.replace(", items=items)


def _extended(
    was: dict[str, Any], new: dict[str, Any], *, name: str, imports: Imports
) -> Group:
    """Write a dict as another one with some items changed or added."""
    items = {
        key: value for key, value in new.items() if key not in was or was[key] != value
    }
    start = [("**", name)] if was else []
    return Group(
        opening="{",
        items=[*start, *dict_items(items, imports=imports)],
        closing="}",
    )
