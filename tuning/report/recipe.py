"""Write the winner of a sweep as a recipe: Python source, ready to paste.

The source is laid out as `ruff format` does it, so that it can be kept as it is.
"""

from __future__ import annotations

import dataclasses
import math
import textwrap
from collections.abc import Mapping
from typing import Any

from pipelines.config.overrides import change_fields, differing
from pipelines.config.own_code import OwnCode
from pipelines.config.recipes import load_recipe, own_run
from sovit import Pooling
from tuning.report.table import value_of
from tuning.trials.ledger import Sweep, TrialRecord

FUNCTION = "best"
_LEFT = "    "
_LINE_LENGTH = 88
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
    names = {"pipelines.config": "Run", "pipelines.config.overrides": "change_fields"}
    if sweep.code:
        names["pipelines.config.own_code"] = "OwnCode"
        names["pipelines.config.recipes"] = "load_code, own_run"
        start = f"own_run(CODE, function={string(function)})"
    else:
        names["pipelines.config.recipes"] = "load_recipe"
        start = f"load_recipe({string(sweep.recipe)})"
    body = [f"run = {start}"]
    if before.model.pooling is None and now.model.pooling is not None:
        names["sovit"] = "Pooling"
        before = change_fields(before, {"model.pooling": Pooling()})
        body.append('run = change_fields(run, {"model.pooling": Pooling()})')
    imports = [f"from {module} import {names[module]}" for module in sorted(names)]
    return "\n".join(
        [
            *_header(sweep, winner),
            "",
            "from __future__ import annotations",
            "",
            *imports,
            *(_code_lines(sweep.code) if sweep.code else []),
            "",
            "",
            f"def {FUNCTION}() -> Run:",
            *_says(sweep, winner),
            *(_LEFT + line for line in [*body, *_changed(differing(before, now))]),
            "",
        ]
    )


def _changed(fields: Mapping[str, Any]) -> list[str]:
    """Write how a function returns its run with other fields, one a line."""
    lines = [f"{_LEFT * 2}{string(name)}: {literal(fields[name])}," for name in fields]
    return [
        "return change_fields(",
        f"{_LEFT}run,",
        f"{_LEFT}{{",
        *(line + _pragma(_LEFT + line[:-1]) for line in lines),
        f"{_LEFT}}},",
        ")",
    ]


def literal(value: Any) -> str:
    """Write a field's value as ruff does."""
    if isinstance(value, str):
        return string(value)
    if isinstance(value, float) and not math.isfinite(value):
        return f'float("{value}")'
    if isinstance(value, tuple):
        items = ", ".join(map(literal, value))
        return f"({items},)" if len(value) == 1 else f"({items})"
    return repr(value)


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
        left=_LEFT,
    )


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


def string(value: str) -> str:
    """Quote a string as ruff does: double quotes unless that needs more escapes.

    The result is ASCII.
    """
    quoted = ascii(value)
    body = quoted[1:-1]
    if quoted[0] == "'":
        body = body.replace("\\'", "'")
    mark = "'" if value.count('"') > value.count("'") else '"'
    return mark + body.replace(mark, "\\" + mark) + mark


def multi_line(text: str) -> str:
    """Write a text and a comma, one source line per line of it. ASCII alone."""
    lines = []
    for line in text.split("\n"):
        # What ruff would find fault with at a line's end is no blank any more.
        kept = line.rstrip(" ")
        escaped = kept.encode("unicode_escape").decode()
        lines.append(escaped + "\\x20" * (len(line) - len(kept)))
    body = "\n".join(lines).replace('"""', '\\"\\"\\"')
    if body.endswith('"'):
        body = body[:-1] + '\\"'
    return f'"""\\\n{body}""",' + next(filter(None, map(_pragma, lines)), "")


def docstring(*paragraphs: str, left: str = "") -> list[str]:
    """Lay out a docstring; an indented paragraph is left as it is."""
    lines: list[str] = []
    for words in paragraphs:
        # A path may hold what ends a docstring, or begins an escape.
        words = ascii(words)[1:-1].replace('"', "'")
        if words.startswith(" "):
            lines += ["", left + words]
            continue
        lines += [
            "",
            *textwrap.wrap(
                words if lines else '"""' + words,
                width=_LINE_LENGTH,
                initial_indent=left,
                subsequent_indent=left,
                break_long_words=False,
                break_on_hyphens=False,
            ),
        ]
    return [*lines[1:], left + '"""']


def _pragma(line: str) -> str:
    """Return the noqa of a line that is too long; a single word needs none."""
    is_long = "\n" not in line and len(line) + 1 > _LINE_LENGTH
    return "  # noqa: E501" if is_long and len(line.split()) > 1 else ""
