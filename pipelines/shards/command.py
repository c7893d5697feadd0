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

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import tyro

from pipelines.cli.command import fail, parse, run_command
from pipelines.data.shard_set import ROWS_PER_GROUP
from pipelines.shards.listing import Fields
from pipelines.shards.making import Executor, Summary, Task, make_set
from pipelines.shards.planning import Done, Recipe
from pipelines.shards.sources import Kind, list_source
from pipelines.shards.state import REPORT_FILE
from pipelines.shards.understood import share_left_out, summarize
from pipelines.storage.path import StoragePath

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
            f"expected a share from 0 to 1, got {arguments.max_bad_share}; mend "
            "--max-bad-share"
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
        raise ValueError(f"expected a plain --name for the files, got {name!r}")
    scratch = None if arguments.scratch is None else arguments.scratch.absolute()
    return make_set(
        listing,
        out=out,
        name=name,
        recipe=recipe,
        scratch=scratch,
        overwrite=arguments.overwrite,
        execute=execute,
    )


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
