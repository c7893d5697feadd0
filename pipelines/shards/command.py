"""The command `sovit-shards`: images of any kind of source to one shard set.

    sovit-shards SOURCE OUT [--kind KIND] [--classes FILE] ...

All images are listed first, put into one seeded order and cut into shards; then one
Ray Data task a shard gathers its images from wherever they lie. That reads a tar or a
folder at random, so the source belongs on a disk that seeks well. Memory does not grow
with the source: a task took 380 MB for a shard of 136 MB; the list of ImageNet's 1.28
million images takes 0.7 GB in the driver and 91 MB on the disk.

OUT may be in a bucket, s3://bucket/train: then a shard is written to a temporary file
and put there whole. Where the command runs on several machines, SOURCE (and OUT, or
--scratch) lie on a file system they share, and each has the store's settings in its
environment.

Measured on one core of an EPYC (500x375, 105 kB a photograph): --check full costs 1 ms
an image, --check header 0.01 ms, --short-side 256 4 ms. zstd shrinks photographs by
nothing, so the image column is not compressed.
"""

from __future__ import annotations

import functools
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import tyro
from tqdm import tqdm

from pipelines.cli.command import fail, parse, run_command
from pipelines.data.shard_format import ROWS_PER_GROUP
from pipelines.shards.build import build_shard, unpack_container
from pipelines.shards.listing import Fields
from pipelines.shards.planning import Done, Plan, Recipe, make_plan
from pipelines.shards.sources import Kind, list_source
from pipelines.shards.state import (
    REPORT_FILE,
    finish,
    open_out,
    pending_shards,
    read_report,
)
from pipelines.shards.understood import (
    Report,
    share_left_out,
    summarize,
    warnings,
)
from pipelines.storage.path import StoragePath

logger = logging.getLogger(__name__)

Task = Callable[[int], Done]
Executor = Callable[[Task, Sequence[int]], Iterator[Done]]
SECONDS_PER_LINE = 15.0
_PROG = "sovit-shards"


@dataclass(frozen=True)
class Arguments:
    """Turn labelled images into Parquet shards for training.

    Attributes:
        source: A folder, zip or tar with a folder for each class; ImageNet's
            ILSVRC2012_img_train.tar or its class tars; ILSVRC2012_img_val.tar;
            WebDataset tars; Hugging Face Parquet files. A path, or an address such as
            s3://bucket/images. Several files: their folder, or a quoted pattern,
            'data/train-*.parquet'.
        out: Folder of the shard set: a path or an address such as s3://bucket/train.
        kind: What the source is, found out where it is not given: "folder" for class
            folders, "ilsvrc-train" for a tar a class, "ilsvrc-val" for images that
            --labels labels.
        classes: Class names in the order of their labels: a text, a JSON list, or
            another set's folder or address. Give a validation set the training set's.
        subset: Leave out images of classes that --classes does not name.
        labels: Labels of images that have none: a CSV of names and labels, lines NAME
            LABEL, or a label a line in the order of the names; or ImageNet's devkit as
            it was downloaded, ILSVRC2012_devkit_t12.tar.gz.
        synsets: The devkit's meta.mat, or lines ID WORDNET_ID, where --labels has the
            devkit's ids without the devkit.
        count_from: Number of the first class where labels are numbers.
        image_field: Parquet's column of images; a WebDataset sample's suffix of it.
        label_field: The same for the label; also a field of a sample's .json, or a
            column of --labels.
        class_depth: Which folder on the way to an image names its class, 1 for those in
            SOURCE. Given, it is not asked whether they are classes.
        subfolder: Folder within SOURCE that is meant, for a zip or tar of several.
        name: First part of the files' names; that of OUT where it is not given.
        seed: Of the order of the rows.
        num_shards: How many files; by default one for each 128 MiB, and at least 8.
        rows_per_group: Most rows of a row group, which ends at 4 MiB in any case.
        check: "full" decodes every image; "header" does not see what is broken within.
        short_side: Re-encode images whose shorter side has more pixels than this.
        quality: JPEG quality of those.
        max_bad_share: Exit with 1 where a larger share of the images was left out.
        overwrite: Delete the set in OUT and start anew.
        scratch: Folder that Parquet files of the source are unpacked to for the time of
            the work; within OUT where it is not given. Needed where OUT is no path.
    """

    source: tyro.conf.Positional[str | Path]
    out: tyro.conf.Positional[str | Path]
    kind: Kind | None = None
    classes: str | Path | None = None
    subset: bool = False
    labels: str | Path | None = None
    synsets: str | Path | None = None
    count_from: Literal[0, 1] | None = None
    image_field: str | None = None
    label_field: str | None = None
    class_depth: int | None = None
    subfolder: str | None = None
    name: str | None = None
    seed: int = 0
    num_shards: int | None = None
    rows_per_group: int = ROWS_PER_GROUP
    check: Literal["full", "header"] = "full"
    short_side: int | None = None
    quality: int = 90
    max_bad_share: float = 1.0
    overwrite: bool = False
    scratch: Path | None = None


@dataclass(frozen=True)
class Summary:
    """Outcome of a run of the command."""

    plan: Plan
    report: Report
    was_finished: bool

    @property
    def done(self) -> Done:
        """Numbers of rows written and of images left out."""
        return Done(
            num_rows=self.report["num_rows"], num_skipped=self.report["num_skipped"]
        )


def in_process(task: Task, indices: Sequence[int]) -> Iterator[Done]:
    """Run the tasks in this process, one after the other."""
    return map(task, indices)


def on_ray(task: Task, indices: Sequence[int]) -> Iterator[Done]:
    """Run the tasks as Ray Data tasks of one CPU each, and yield as they end.

    Starts a local Ray if none runs and RAY_ADDRESS names none.

    Raises:
        OSError: A task raised one; its text is kept.
        ValueError: The same.
    """
    import ray
    import ray.data

    if not ray.is_initialized():
        joins = bool(os.environ.get("RAY_ADDRESS"))  # then Ray wants no dashboard flag
        ray.init(
            include_dashboard=None if joins else False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    logging.getLogger("ray.data").setLevel(logging.ERROR)

    def run_one(row: dict[str, int]) -> dict[str, int | str | bool]:
        # An exception would come back as Ray's own, among pages of its log.
        try:
            done = task(int(row["index"]))
        except (OSError, ValueError) as error:
            is_passing = isinstance(error, OSError)
            said = {"error": str(error), "is_passing": is_passing}
            return {"num_rows": 0, "num_skipped": 0, **said}
        return {**asdict(done), "error": "", "is_passing": False}

    items = [{"index": index} for index in indices]
    tasks = ray.data.from_items(items, override_num_blocks=len(items)).map(run_one)
    tasks.context.enable_progress_bars = False
    # One block a task, without prefetching: each is yielded as soon as it ends.
    for block in tasks.iter_batches(batch_size=None, prefetch_batches=0):
        names = ("num_rows", "num_skipped", "error", "is_passing")
        columns = (block[name] for name in names)
        for num_rows, num_skipped, error, is_passing in zip(*columns, strict=True):
            if error:
                raise (OSError if is_passing else ValueError)(str(error))
            yield Done(num_rows=int(num_rows), num_skipped=int(num_skipped))


def make_shards(arguments: Arguments, *, execute: Executor = on_ray) -> Summary:
    """Make a shard set, or resume one that was interrupted.

    Args:
        arguments: The command line.
        execute: What does the tasks: `on_ray` or `in_process`.

    Raises:
        ValueError: The source, the options or what OUT holds cannot be used.
        OSError: A file cannot be read or written.
    """
    recipe = Recipe(
        seed=arguments.seed,
        num_shards=arguments.num_shards,
        rows_per_group=arguments.rows_per_group,
        check=arguments.check,
        short_side=arguments.short_side,
        quality=arguments.quality,
    )
    if not 0 <= arguments.max_bad_share <= 1:
        raise ValueError(
            f"Wanted a share from 0 to 1, got {arguments.max_bad_share}: mend "
            "--max-bad-share."
        )
    source = _absolute(StoragePath(str(arguments.source)))  # tasks run in other folders
    out = _absolute(StoragePath(str(arguments.out)))
    if _is_within(out, source):
        raise ValueError(f"OUT is within the source: put {out} elsewhere.")
    listing = list_source(
        source.address,
        kind=arguments.kind,
        labels=arguments.labels,
        synsets=arguments.synsets,
        classes_file=arguments.classes,
        subset=arguments.subset,
        count_from=arguments.count_from,
        fields=Fields(arguments.image_field, arguments.label_field),
        class_depth=arguments.class_depth,
        subfolder=arguments.subfolder,
    )
    name = arguments.name or out.name
    if Path(name).name != name:
        raise ValueError(f"Wanted a plain --name for the files, got {name!r}.")
    scratch = None if arguments.scratch is None else arguments.scratch.absolute()
    plan = make_plan(listing, out=out, name=name, recipe=recipe, scratch=scratch)
    if open_out(plan, listing=listing, overwrite=arguments.overwrite):
        return _told(Summary(plan, read_report(plan), was_finished=True))
    logger.info(
        "%s: %s images of %s classes",
        listing.layout,
        f"{plan.num_rows:,}",
        f"{len(listing.classes):,}",
    )
    try:
        _run(plan, execute=execute)
        report = finish(plan, listing=listing)
    except OSError as error:
        raise OSError(f"{error}; {_how_on(arguments)}") from error
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"stopped; {_how_on(arguments)}") from None
    return _told(Summary(plan, report, was_finished=False))


def _how_on(arguments: Arguments) -> str:
    without = " without --overwrite" if arguments.overwrite else ""
    return f"the same command{without} goes on from here"


def _told(summary: Summary) -> Summary:
    """Log warnings of what the user should look at."""
    if "classes" in summary.report:
        for warning in warnings(summary.report):
            logger.warning(warning)
    return summary


def _is_within(out: StoragePath, source: StoragePath) -> bool:
    if out.is_remote or source.is_remote:
        return out.is_remote == source.is_remote and (
            f"{out}/".startswith(f"{str(source).rstrip('/')}/")
        )
    return Path(source.address) in (Path(out.address), *Path(out.address).parents)


def _absolute(place: StoragePath) -> StoragePath:
    if place.is_remote:
        return place
    return StoragePath(str(Path(place.open()[1]).absolute()))


def _run(plan: Plan, *, execute: Executor) -> None:
    pending = pending_shards(plan)
    if plan.kind == "parquet" and pending:
        task = functools.partial(unpack_container, plan)
        done = execute(task, range(len(plan.containers)))
        for _ in _watch(done, num_images=plan.num_rows, verb="unpacking"):
            pass
    if pending:
        num_images = plan.num_rows * len(pending) // plan.num_shards
        done = execute(functools.partial(build_shard, plan), pending)
        for _ in _watch(done, num_images=num_images, verb="writing"):
            pass


def _watch(done: Iterator[Done], *, num_images: int, verb: str) -> Iterator[Done]:
    """Show a progress bar on a terminal, else a line every 15 seconds."""
    is_terminal = sys.stderr.isatty()
    bar = tqdm(total=num_images, desc=verb, unit=" images", disable=not is_terminal)
    num_done, num_first = 0, 0
    start_s = last_s = time.monotonic()
    for item in done:
        num_done += item.num_rows + item.num_skipped
        bar.update(item.num_rows + item.num_skipped)
        now_s = time.monotonic()
        if num_first == 0:  # until here it was Ray that started
            num_first, start_s, last_s = num_done, now_s, now_s
        elif not is_terminal and now_s - last_s >= SECONDS_PER_LINE:
            rate = (num_done - num_first) / (now_s - start_s)
            left_s = max(0, num_images - num_done) / rate
            print(
                f"{verb}: {num_done:,} of {num_images:,} images, {rate:,.0f} a second, "
                f"{left_s / 60:.1f} minutes left",
                file=sys.stderr,
            )
            last_s = now_s
        yield item
    bar.close()


def main() -> None:
    """Run the command: exit code 2 for a user's error, 1 for too many bad images."""
    run_command(_main, prog=_PROG)


def _main(arguments: Sequence[str]) -> None:
    parsed = parse(Arguments, arguments=arguments, prog=_PROG)
    try:
        summary = make_shards(parsed)
    except OSError as error:
        raise ValueError(str(error)) from error
    except KeyboardInterrupt as error:
        fail(f"{_PROG}: {str(error) or 'stopped'}", status=130)
    raise SystemExit(_conclude(summary, max_bad_share=parsed.max_bad_share))


def _conclude(summary: Summary, *, max_bad_share: float) -> int:
    plan, report = summary.plan, summary.report
    if summary.was_finished:
        print("finished before, nothing to do:")
    place = str(plan.out.within(REPORT_FILE))
    print(summarize(report, out=str(plan.out), num_shards=plan.num_shards, place=place))
    share = share_left_out(report)
    if not report["num_rows"] or share > max_bad_share:
        print(
            f"{_PROG}: {share:.2%} of the images were left out, more than allowed",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    main()
