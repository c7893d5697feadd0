"""Make a shard set of a listing, or go on with one; its tasks run where one says."""

from __future__ import annotations

import functools
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from pipelines.shards.build import build_shard, unpack_container
from pipelines.shards.listing import Listing
from pipelines.shards.planning import Done, Plan, Recipe, make_plan
from pipelines.shards.state import finish, open_out, pending_shards, read_report
from pipelines.shards.understood import Report, warnings_of
from pipelines.storage.path import StoragePath

logger = logging.getLogger(__name__)

Task = Callable[[int], Done]
Executor = Callable[[Task, Sequence[int]], Iterator[Done]]
SECONDS_PER_LINE = 15.0
# Each holds the images of a shard in memory.
_MAX_SHARDS_AT_A_TIME = 8


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


def in_threads(task: Task, indices: Sequence[int]) -> Iterator[Done]:
    """Run the tasks on threads of this process: decoders let each other run."""
    num_threads = min(os.cpu_count() or 1, _MAX_SHARDS_AT_A_TIME)
    # Checks of images change the filters of warnings, and threads do so at a time.
    with warnings.catch_warnings(), ThreadPoolExecutor(num_threads) as pool:
        try:
            yield from pool.map(task, indices)
        finally:
            pool.shutdown(cancel_futures=True)


def make_set(
    listing: Listing,
    *,
    out: StoragePath,
    name: str,
    recipe: Recipe,
    execute: Executor,
    scratch: Path | None = None,
    overwrite: bool = False,
) -> Summary:
    """Make the shard set of a listing, or resume one that was interrupted.

    Args:
        listing: The images.
        out: Folder of the set.
        name: First part of its files' names.
        recipe: How images become rows.
        execute: What does the tasks, such as `in_process`.
        scratch: Folder that Parquet files of the source are unpacked to.
        overwrite: Delete the set in `out` and start anew.

    Raises:
        ValueError: The source or what `out` holds cannot be used.
        OSError: A file cannot be read or written.
    """
    plan = make_plan(listing, out=out, name=name, recipe=recipe, scratch=scratch)
    if open_out(plan, listing=listing, overwrite=overwrite):
        return _told(Summary(plan, read_report(plan), was_finished=True))
    logger.info(
        "%s: %s images of %s classes",
        listing.layout,
        f"{plan.num_rows:,}",
        f"{len(listing.classes):,}",
    )
    without = " without --overwrite" if overwrite else ""
    go_on = f"the same command{without} goes on from here"
    try:
        _run(plan, execute=execute)
        report = finish(plan, listing=listing)
    except OSError as error:
        raise OSError(f"{error}; {go_on}") from error
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"stopped; {go_on}") from None
    return _told(Summary(plan, report, was_finished=False))


def _told(summary: Summary) -> Summary:
    """Log warnings of what the user should look at."""
    if "classes" in summary.report:
        for warning in warnings_of(summary.report):
            logger.warning(warning)
    return summary


def _run(plan: Plan, *, execute: Executor) -> None:
    pending = pending_shards(plan)
    if plan.kind == "parquet" and pending:
        task = functools.partial(unpack_container, plan)
        done = execute(task, range(len(plan.containers)))
        for _ in watch(done, num_images=plan.num_rows, verb="unpacking"):
            pass
    if pending:
        num_images = plan.num_rows * len(pending) // plan.num_shards
        done = execute(functools.partial(build_shard, plan), pending)
        for _ in watch(done, num_images=num_images, verb="writing"):
            pass


def watch(done: Iterator[Done], *, num_images: int, verb: str) -> Iterator[Done]:
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
