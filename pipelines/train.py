"""Train a recipe: `sovit-train RECIPE [--typed.overrides]`.

    sovit-train demo
    sovit-train finetune.folder --data.train ~/photos
    sovit-train imagenet.so_vit_14 --data.train shards --scale.num-workers 8
    sovit-train --resume NAME
    sovit-train imagenet.so_vit_14 --dry-run --plot rate.png

A new run gets a new name; `--resume` goes on with a run that did not finish, from its
last checkpoint and with its own configuration. With a recipe, `--resume NAME` begins
the run where there is none of that name, so the same command may be given again and
again. Ctrl-C, SIGTERM and SIGHUP are answered with a checkpoint and an end, with exit
status 75. `--dry-run` starts nothing: it prints model, data, steps, rate, memory, time
and places, and `--plot` draws the rate.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

from pipelines import tracking
from pipelines.checkpoints.run_record import find_record
from pipelines.cli.command import parse, run_command
from pipelines.cli.help_text import COMMON, help_text, wants_help
from pipelines.config import Run
from pipelines.config.recipes import load_recipe, own_code_of
from pipelines.driver.fit import fit
from pipelines.driver.preflight import (
    check_one_name,
    check_same,
    load_recorded,
    record_to_resume,
    recorded_facts,
    recorded_shards,
    run_and_storage,
    with_absolute_paths,
    with_shards,
)
from pipelines.dry_run.command import show_dry_run
from pipelines.evaluation.figures import (
    ARTIFACT_FOLDER,
    CONFUSION_FILE,
    WORST_FILE,
)
from pipelines.evaluation.held_out import OWN_SET
from pipelines.storage.redaction import command_line, without_credentials
from pipelines.training.model import title_of
from pipelines.worker.job import Trained

_PROG = "sovit-train"
_OWN_OPTIONS = {
    "--name NAME": "Name of a new run; by default the recipe's and the time.",
    "--resume NAME": "Go on with this run, or begin it where a recipe is named too.",
    "--storage FOLDER": "Folder or bucket that holds the runs (default: the recipe's).",
    "--dry-run": "Show what the run will do; start and write nothing.",
    "--plot FILE": "With --dry-run, draw the learning rate.",
    "-h, --help": "Show this help, with the recipe's defaults where one is named.",
    "--help-all": "Show every field of a run.",
}


# A trial that is tried again may come before Ray has ended its last process.
def main() -> None:
    """Run the command line."""
    run_command(_main, prog=_PROG)


def _main(arguments: Sequence[str]) -> None:
    recipe = ""
    if arguments and not arguments[0].startswith("-"):
        recipe, *arguments = arguments
    if wants_help(arguments):
        default = load_recipe(recipe or "demo")
        print(
            help_text(
                lambda rest: parse(Run, default=default, arguments=rest, prog=_PROG),
                text=__doc__ or "",
                own=_OWN_OPTIONS,
                common=COMMON,
                arguments=arguments,
            )
        )
        return
    parser = argparse.ArgumentParser(_PROG, add_help=False, allow_abbrev=False)
    for option in ("--name", "--resume", "--storage", "--plot"):
        parser.add_argument(option, default="")
    parser.add_argument("--dry-run", action="store_true")
    chosen, rest = parser.parse_known_args(arguments)
    chosen.resume, chosen.storage = run_and_storage(
        chosen.resume, storage=chosen.storage
    )
    if chosen.storage:
        rest += ["--storage", chosen.storage]
    record = None
    if chosen.resume:
        check_one_name(chosen.name, resume=chosen.resume)
        record = record_to_resume(chosen.resume, storage=chosen.storage, recipe=recipe)
    if record is None and not recipe:
        raise ValueError(
            "expected a recipe, such as demo or imagenet.so_vit_14, or --resume NAME; "
            "got neither"
        )
    default = record.run if record else load_recipe(recipe)
    run = parse(Run, default=default, arguments=rest, prog=_PROG, text=__doc__)
    code = record.code if record else own_code_of(recipe)
    if record is not None:
        run = recorded_shards(run, record=record)
        check_same(record.run, run)
    else:
        run = with_shards(
            run,
            recipe=recipe,
            typed=rest,
            parse_on=lambda run: parse(Run, default=run, arguments=rest, prog=_PROG),
            makes=not chosen.dry_run,
        )
        if run is None:
            return
    if record is not None and recipe:
        fitted = load_recipe(recipe, facts=recorded_facts(record))
        named = parse(Run, default=fitted, arguments=rest, prog=_PROG)
        advice = f"leave out {recipe} to go on with what it began with"
        check_same(record.run, with_absolute_paths(named), advice=advice)
    if record and record.code:
        load_recorded(record.code)  # after the file as it is now: the last one counts
    name = chosen.resume or chosen.name or _new_name(run)
    if chosen.plot and not chosen.dry_run:
        raise ValueError("expected --dry-run with --plot, got --plot alone; give both")
    if chosen.dry_run:
        show_dry_run(run, name=name, record=record, plot=chosen.plot)
        return
    start_s = time.monotonic()
    trained = fit(run, name=name, record=record, code=code)
    print_summary(trained, run=run, name=name, seconds=time.monotonic() - start_s)


def _new_name(run: Run) -> str:
    return f"{run.recipe}-{time.strftime('%Y%m%d-%H%M%S')}"


def print_summary(trained: Trained, *, run: Run, name: str, seconds: float) -> None:
    """Print what a run came to, and what to type next."""
    metrics, folder = trained.metrics, trained.checkpoint
    uri = tracking.default_uri(with_absolute_paths(run).storage)
    held_out = (
        f"held-out top-1 {metrics.get('val/top1', float('nan')):.2f} % of "
        f"{metrics.get('val/num_images', 0):,.0f} images"
    )
    if not run.validation.held_out:
        held_out = "nothing held out"
    print(f"trained {title_of(run.model)} in {seconds:.0f} s: {held_out}")
    if folder is not None:
        print(f"checkpoint  {folder}")
        if trained.best is not None and trained.best != folder:
            top1 = trained.best_metrics["val/top1"]
            print(f"best        {trained.best}  held-out top-1 {top1:.2f} %")
        val = run.data.val or "SHARDS"
        best = trained.best or folder
        print(f"evaluate    {command_line('sovit-eval', best, val)}")
        print(f"predict     {command_line('sovit-predict', best, val)}")
    run_id = _mlflow_run_id(run, name=name)
    for what, file in (("confusions", CONFUSION_FILE), ("worst", WORST_FILE)):
        path = f"{ARTIFACT_FOLDER}/{OWN_SET}/{file}"
        if picture := tracking.artifact_file(uri, run_id, path=path):
            print(f"{what:11} {picture}")
    address = without_credentials(uri)
    is_server = address.startswith("http")
    ui = command_line("mlflow", "ui", "--backend-store-uri", address)
    print(f"compare     {address if is_server else ui}")


def _mlflow_run_id(run: Run, *, name: str) -> str:
    record = find_record(with_absolute_paths(run).storage, name=name)
    return record.mlflow_run_id if record else ""


if __name__ == "__main__":
    main()
