"""Search the settings of a recipe: `sovit-tune RECIPE SPACE [--typed.overrides]`.

    sovit-tune demo pooling --num-trials 12 --scale.num-workers 1
    sovit-tune imagenet.so_vit_14 pooling,optim --method optuna --max-gpu-hours 500
    sovit-tune demo my/space.py:narrow --head-from runs/demo-1/epoch_0008
    sovit-tune finetune.folder optim --data.train ~/photos --scale.num-workers 1
    sovit-tune --resume NAME

Each trial is a run like any other, below the sweep's in MLflow. Trials that are behind
are stopped early, those that fail are tried again. What the sweep found is written down
as it comes: killed at any moment, it goes on with `--resume`.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated

import tyro

from pipelines.cli.command import parse, run_command
from pipelines.cli.help_text import COMMON, help_text, wants_help
from pipelines.config import Run
from pipelines.config.recipes import load_recipe, own_code_of
from pipelines.driver.preflight import (
    load_recorded,
    run_and_storage,
    with_absolute_paths,
    with_shards,
)
from pipelines.storage.filesystem import absolute
from tuning.checks import check_sweep_name
from tuning.spaces import Space, load_space, words_of
from tuning.trials.ledger import Sweep, read_sweep
from tuning.trials.options import Search

_PROG = "sovit-tune"
_OWN_OPTIONS = {
    "--name NAME": "Name of a new sweep; by default the recipe's and the time.",
    "--resume NAME": "Go on with this sweep.",
    "--storage FOLDER": "Folder or bucket that holds the sweeps.",
    "--retry-failed": "With --resume, try those once more that failed.",
    "-h, --help": "Show this help, with the recipe's defaults where one is named.",
    "--help-all": "Show every field of the search and of a run.",
}
_SEARCH = (
    *("method", "num-trials", "num-concurrent", "scheduler", "metrics", "modes"),
    *("max-gpu-hours", "head-from"),
)
# What may differ when a sweep goes on: what was tried stays what it was.
_FREE = ("num_trials", "num_concurrent", "max_gpu_hours", "num_retries")


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to search, and what all trials have in common."""

    search: Annotated[Search, tyro.conf.arg(name="")] = field(default_factory=Search)
    run: Annotated[Run, tyro.conf.arg(name="")]


def main() -> None:
    """Run the command line."""
    run_command(_main, prog=_PROG)


def _main(arguments: Sequence[str]) -> None:
    from tuning.sweep import carry_out

    chosen, rest = _split(arguments)
    if wants_help(rest):
        default = Options(run=load_recipe((*chosen.names, "demo")[0]))
        print(
            help_text(
                lambda rest: parse(
                    Options, default=default, arguments=rest, prog=_PROG
                ),
                text=__doc__ or "",
                own=_OWN_OPTIONS,
                common=(*_SEARCH, *COMMON),
                arguments=rest,
            )
        )
        return
    if chosen.resume:
        sweep, space = _resumed(chosen, rest)
    else:
        sweep, space = _begun(chosen, rest)
    carry_out(sweep, space=space, retries_failed=chosen.retry_failed)


def _split(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Split off the arguments that are no field of the run or the search."""
    parser = argparse.ArgumentParser(_PROG, add_help=False, allow_abbrev=False)
    names: list[str] = []
    rest = list(arguments)
    while rest and not rest[0].startswith("-") and len(names) < 2:
        names.append(rest.pop(0))
    for option in ("--name", "--resume", "--storage"):
        parser.add_argument(option, default="")
    parser.add_argument("--retry-failed", action="store_true")
    chosen, rest = parser.parse_known_args(rest)
    chosen.names = names
    return chosen, rest


def _begun(chosen: argparse.Namespace, rest: list[str]) -> tuple[Sweep, Space]:
    """Create a new sweep; every user error is found here."""
    if len(chosen.names) < 2:
        raise ValueError(
            "expected a recipe and a space, as in `sovit-tune demo pooling`, or "
            f"--resume NAME; got {' '.join(chosen.names) or 'neither'}"
        )
    recipe, space_name = chosen.names
    default = load_recipe(recipe)
    if chosen.storage:
        rest += ["--storage", chosen.storage]

    def parse_on(default: Run) -> Options:
        # A trial keeps what goes on with it; the best can be evaluated and exported.
        default = dataclasses.replace(default, num_checkpoints_to_keep=1)
        return parse(
            Options,
            default=Options(run=default),
            arguments=rest,
            prog=_PROG,
            text=__doc__,
        )

    options = parse_on(default)
    run = with_shards(
        options.run,
        recipe=recipe,
        typed=rest,
        parse_on=lambda default: parse_on(default).run,
    )
    run = with_absolute_paths(run or options.run)
    name = chosen.name or f"{run.recipe}-sweep-{time.strftime('%Y%m%d-%H%M%S')}"
    check_sweep_name(run.storage, name=name)
    space_name = _absolute(space_name)
    space = load_space(space_name, run=run)
    return Sweep(
        name=name,
        recipe=recipe,
        run=run,
        space=space_name,
        domains=words_of(space),
        search=options.search,
        code=own_code_of(recipe),
        id=uuid.uuid4().hex,
    ), space


def _absolute(space: str) -> str:
    """Make the paths of a space's files absolute, so that it resumes anywhere."""
    names = space.split(",")
    return ",".join(absolute(name) if ".py:" in name else name for name in names)


def _resumed(chosen: argparse.Namespace, rest: list[str]) -> tuple[Sweep, Space]:
    """Load a sweep to resume."""
    named = [*chosen.names, *([f"--name {chosen.name}"] if chosen.name else [])]
    if named:
        raise ValueError(
            f"expected --resume NAME alone, got {' '.join(named)} too; the sweep goes "
            "on with what it began with"
        )
    chosen.resume, chosen.storage = run_and_storage(
        chosen.resume, storage=chosen.storage
    )
    storage = absolute(chosen.storage or "runs")
    sweep = read_sweep(storage, name=chosen.resume)
    # A sweep that an earlier version began has no code.
    sweep = dataclasses.replace(sweep, code=sweep.code or own_code_of(sweep.recipe))
    if sweep.code:
        load_recorded(sweep.code)  # it may register the model
    search = parse(Search, default=sweep.search, arguments=rest, prog=_PROG)
    changed = [
        field.name
        for field in dataclasses.fields(Search)
        if getattr(search, field.name) != getattr(sweep.search, field.name)
        and field.name not in _FREE
    ]
    if changed:
        raise ValueError(
            "expected the settings that the sweep began with, got others for "
            f"{', '.join(changed)}; only {', '.join(_FREE)} may change"
        )
    space = load_space(sweep.space, run=sweep.run)
    if words_of(space) != dict(sweep.domains):
        raise ValueError(
            f"expected the space that the sweep began with, {dict(sweep.domains)}, got "
            f"{words_of(space)}; undo the change of {sweep.space}, or begin a new sweep"
        )
    run = dataclasses.replace(sweep.run, storage=storage)
    return dataclasses.replace(sweep, search=search, run=run), space


if __name__ == "__main__":
    main()
