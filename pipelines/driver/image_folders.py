"""Put shards in the place of folders of images before a run begins or is described."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pipelines.checkpoints.run_record import Record
from pipelines.config import Facts, Run
from pipelines.config.recipes import load_recipe
from pipelines.data.shard_set import read_shard_set
from pipelines.hardware.device import gpus_here
from pipelines.shards.folder import (
    FolderPlan,
    FolderSets,
    holds_images,
    is_shard_set,
    make_folder_sets,
    plan_folder,
    read_folder_sets,
    sets_to_be,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class FolderShards:
    """Shard sets that stand for a run's folders of images."""

    sets: FolderSets
    val: str = ""
    """Address of the held-out set, these images' or another; "" where there is none."""
    lines: tuple[str, ...] = ()
    """What would be made, where nothing was; empty where the sets are there."""

    def facts(self, run: Run) -> Facts | None:
        """Return what a recipe may fit itself to; None without a folder to train on."""
        if not self.sets.train:
            return None
        return Facts(
            num_images=self.sets.num_train,
            num_classes=self.sets.num_classes,
            short_side=self.sets.short_side,
            num_gpus=gpus_here()[0],
            num_cpus=os.cpu_count() or 1,
            model=run.model.name,
            init_from=run.model.init_from,
        )

    def put_in(self, run: Run) -> Run:
        """Return the run with the shards in the place of the folders."""
        data = dataclasses.replace(
            run.data,
            train=self.sets.train or run.data.train,
            val=self.val,
            val_share=None,
        )
        return dataclasses.replace(run, data=data)


def shards_of_folders(
    run: Run, *, typed: Sequence[str] = (), makes: bool = True
) -> FolderShards | None:
    """Make the shards of a run's folders of images, or find them.

    Args:
        run: Whose `data.train` or `data.val` may be such a folder.
        typed: The command's arguments: a recipe's own held-out set, which nobody named,
            is none of a folder that was named.
        makes: False only says what would be made.

    Returns None where both are shards. Raises ValueError where a folder could be two
    things, and for a share to hold out beside a set of held-out images or of shards.
    """
    run, lines = _without_recipes_val(run, typed=typed), []
    try:
        plan = _plan(run)
        if plan is None:
            return None
        sets = make_folder_sets(plan) if makes else plan.found()
        if sets is None:
            sets, notes = sets_to_be(plan)
            lines = [f"would make {plan.place}", *notes]
    except OSError as error:
        raise ValueError(str(error)) from error
    return FolderShards(sets=sets, val=sets.val or run.data.val, lines=tuple(lines))


def _without_recipes_val(run: Run, *, typed: Sequence[str]) -> Run:
    """Drop a recipe's held-out set where another folder of images is trained on."""
    options = {word.partition("=")[0].replace("_", "-") for word in typed}
    is_others = "--data.train" in options and "--data.val" not in options
    if not (is_others and run.data.val and holds_images(run.data.train)):
        return run
    logger.info(
        "%s, the recipe's held-out set, is not of these images: left out; --data.val "
        "sets one",
        run.data.val,
    )
    return dataclasses.replace(run, data=dataclasses.replace(run.data, val=""))


def _plan(run: Run) -> FolderPlan | None:
    data, holds_out = run.data, run.validation.held_out
    if data.val and data.val_share is not None:
        raise ValueError(
            f"data.val_share: expected none beside --data.val, got {data.val_share} "
            f"and {data.val!r}; leave one of the two out"
        )
    of_train = holds_images(data.train)
    of_val = holds_out and holds_images(data.val)
    if not of_train and data.val_share is not None:
        raise ValueError(
            "data.val_share: expected a folder of images in --data.train, got "
            f"{data.val_share} and {data.train!r}; leave it out, and set --data.val"
        )
    if not of_train and not of_val:
        return None
    classes = None
    if of_train != of_val and (of_val or (holds_out and data.val)):
        classes = read_shard_set(data.val if of_train else data.train).classes
    return plan_folder(
        train=data.train if of_train else "",
        val=data.val if of_val else "",
        share=data.val_share,
        holds_out=holds_out and not data.val,
        seed=data.val_seed,
        classes=classes,
        storage=run.storage,
    )


def with_shards(
    run: Run,
    *,
    recipe: str,
    typed: Sequence[str],
    parse_on: Callable[[Run], Run],
    makes: bool = True,
) -> Run | None:
    """Put shards in the place of folders of images, and fit the recipe to these.

    Prints what was picked. None where nothing is to be made and nothing is there: what
    would be is printed.

    Args:
        parse_on: Parses the command's arguments with another recipe's run as default.
    """
    found = shards_of_folders(run, typed=typed, makes=makes)
    if found is None:
        return run
    fitted = load_recipe(recipe, facts=found.facts(run))
    is_fitted = fitted != load_recipe(recipe)
    if is_fitted:
        run = parse_on(fitted)
    run = found.put_in(run)
    for line in found.lines:
        print(line)
    if is_fitted:
        print(describe_fit(run, num_images=found.sets.num_train))
    if found.lines:
        print("the rest is shown once they are made, by the same command")
        return None
    return run


def recorded_shards(run: Run, *, record: Record) -> Run:
    """Return a run to resume with the shards that it began with.

    Its folder of images may be named again, changed or gone: the shards count.
    """
    was = record.run.data
    if is_shard_set(run.data.train) or read_folder_sets(was.train) is None:
        return run
    data = dataclasses.replace(run.data, train=was.train, val=was.val, val_share=None)
    logger.info("resuming with the shards that this run began with: %s", was.train)
    return dataclasses.replace(run, data=data)


def recorded_facts(record: Record) -> Facts | None:
    """Return the facts that a run's recipe was fitted to, None without any."""
    sets = read_folder_sets(record.run.data.train)
    return sets and FolderShards(sets=sets).facts(record.run)


def describe_fit(run: Run, *, num_images: int) -> str:
    """Describe what a recipe picked for the images, and how to choose otherwise."""
    num_steps = math.ceil(num_images / run.data.batch_size)
    place = "GPUs" if run.scale.use_gpu else "CPUs"
    start = run.model.init_from or (
        "random weights: --model.init-from FILE starts from others, such as the "
        f"authors' or timm's for {run.model.name} (docs/finetuning.md)"
    )
    return (
        f"picked    {run.model.img_size} pixels, batches of {run.data.batch_size} "
        f"({num_steps:,} steps an epoch), {run.optim.num_epochs} epochs, on {place}; "
        "set --model.img-size, --data.batch-size, --optim.num-epochs, "
        "--scale.use-gpu\n"
        f"start     {start}"
    )
