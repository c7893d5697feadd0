"""List the recipes with what they cost, and what was published and measured.

    python -m recipes
    python -m recipes imagenet isqrt --no-count
    python -m recipes --markdown --tracking-uri http://server:5000

Top-1 in percent. Measured is the best finished run in MLflow, one with the recipe's
own settings before all others. Multiply-adds are those of one image.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from pipelines.cli.command import parse, run_command
from pipelines.results.best_runs import best_of, by_recipe
from pipelines.results.recipe_rows import Row, list_rows, with_sizes
from pipelines.results.recipe_table import as_json, as_markdown, as_text
from pipelines.tracking import ADDRESS_VARIABLE, default_uri
from pipelines.tracking.query import RunStore

_PROG = "python -m recipes"
_SQLITE = "sqlite:///"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Which recipes are listed, and how."""

    recipes: tyro.conf.Positional[tuple[str, ...]] = ()
    """Modules, or parts of recipes' names; all if none."""
    markdown: bool = False
    """Write Markdown, a table for each module."""
    json: bool = False
    """Write JSON, with whole numbers."""
    count: bool = True
    """Count parameters and multiply-adds."""
    tracking_uri: Annotated[str, tyro.conf.arg(aliases=["--store"])] = ""
    """MLflow's address; that of the storage folder if empty."""
    storage: str = "runs"
    """Folder that runs were trained in."""

    def __post_init__(self) -> None:
        if self.markdown and self.json:
            raise ValueError("expected one of --markdown and --json, got both")


def scoreboard(options: Options) -> list[Row]:
    """List the wanted recipes, with their sizes and best runs.

    Raises ValueError where no recipe has such a name, or where a store that was named,
    here or in MLFLOW_TRACKING_URI, does not answer.
    """
    rows = list_rows(options.recipes)
    if options.count:
        rows = with_sizes(rows)
    store = _store(options)
    if store is None:
        return rows
    runs = by_recipe(store.finished())
    return [
        dataclasses.replace(
            row, best=best_of(runs.get(row.run.recipe, ()), recipe=row.run)
        )
        for row in rows
    ]


def _store(options: Options) -> RunStore | None:
    """Open the store; None if none was named, and nothing was trained here."""
    if uri := options.tracking_uri or os.environ.get(ADDRESS_VARIABLE, ""):
        return RunStore(uri)
    uri = default_uri(options.storage)
    return RunStore(uri) if Path(uri.removeprefix(_SQLITE)).is_file() else None


def _main(arguments: Sequence[str]) -> None:
    options = parse(Options, arguments=arguments, prog=_PROG, text=__doc__)
    rows = scoreboard(options)
    write = as_json if options.json else as_markdown if options.markdown else as_text
    encoding = sys.stdout.encoding or "utf-8"
    # Names are foreign text, and not every terminal has letters for them.
    print(write(rows).encode(encoding, errors="replace").decode(encoding))


def main() -> None:
    """Run the command line."""
    run_command(_main, prog=_PROG)
