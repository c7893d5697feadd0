"""Compute a backbone's tokens of all images once, in a Ray Data job, for many heads.

    encoded rows of a unit -> an actor with decoder and model -> a Parquet file

Read tasks hand encoded bytes to the actors; each unit of rows becomes one file, written
atomically, whose footer records what it was made from. So a stopped job resumes where
it was, and a finished set is reused.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyarrow.parquet as pq
from tqdm import tqdm

from pipelines.config import Run
from pipelines.data.loader import reading_of
from pipelines.data.shard_set import ShardSet, read_shard_set
from pipelines.driver.preflight import with_absolute_paths
from pipelines.errors import check_bad_share
from pipelines.storage.filesystem import absolute
from pipelines.storage.path import StoragePath
from pipelines.storage.retry import answering, retrying
from tuning.heads.backbone import Backbone, load_backbone
from tuning.heads.feature_set import TOKENS_FILE, TokenReader, TokenSet
from tuning.heads.feature_writer import BAD, MADE_OF, TokenJob, make_job, part_plan
from tuning.heads.parts import Part

__all__ = ["TokenReader", "TokenSet", "TokenSets", "write_tokens"]

logger = logging.getLogger(__name__)
_NUM_THREADS = 16


class TokenSets(NamedTuple):
    """Token sets of a run's training and validation images."""

    train: TokenSet
    val: TokenSet


def write_tokens(
    run: Run, *, checkpoint: str, out: str, num_views: int = 1
) -> TokenSets:
    """Compute the tokens of a run's images, or reuse those already computed.

    One Ray Data job, with an actor for each of the run's workers. Images
    are seen as evaluation sees them; images that can't be decoded are left out.

    Args:
        checkpoint: What the backbone is: see `load_backbone`.
        out: Folder or bucket address; the sets lie in `train` and `val` below it.
        num_views: Views of each training image: the first as evaluation sees it, the
            others changed as in the training's epochs 1, 2 and so on.

    Raises ValueError where the backbone, the shards or the folder can't be used, the
    folder holds tokens of something else, or tokens do not fit float16.
    """
    if num_views < 1:
        raise ValueError(
            f"num_views: expected at least 1, got {num_views}; 1 is evaluation's view"
        )
    run = with_absolute_paths(run)
    place = StoragePath(absolute(out))
    shards = {"train": read_shard_set(run.data.train)}
    shards["val"] = read_shard_set(run.data.val)
    backbone = load_backbone(
        run, checkpoint=checkpoint, num_classes=len(shards["train"].classes)
    )
    jobs = {
        split: make_job(
            run,
            shards=of_split,
            out=place.within(split),
            backbone=backbone,
            num_views=num_views if split == "train" else 1,
        )
        for split, of_split in shards.items()
    }
    with answering():
        return _write(jobs, shards=shards, backbone=backbone)


def _write(
    jobs: Mapping[str, TokenJob],
    *,
    shards: Mapping[str, ShardSet],
    backbone: Backbone,
) -> TokenSets:
    """Write the missing files of all splits in one job, and finish their sets."""
    found: dict[str, TokenSet] = {}
    missing: list[Part] = []
    for split, job in jobs.items():
        finished = _finished(job)
        if finished is None:
            missing += _missing_parts(shards[split], job=job, split=split)
        else:
            found[split] = finished
            logger.info("using the tokens in %s: %s", job.out, _summary(finished))
    if missing:
        _compute(missing, jobs=jobs, shards=shards, backbone=backbone)
    for split, job in jobs.items():
        if split not in found:
            found[split] = _conclude(shards[split], job=job)
            logger.info(
                "tokens of %s in %s: %s",
                backbone.source,
                job.out,
                _summary(found[split]),
            )
    return TokenSets(**found)


def _missing_parts(shards: ShardSet, *, job: TokenJob, split: str) -> list[Part]:
    """List the parts without a file; refuse a folder with files of something else."""
    job.out.check_bucket()
    job.out.make_folder()
    done = _read_footers(job)
    for footer in done.values():
        _check_same(footer.made_of, job=job)
    plan = part_plan(shards, shape=job.shape)
    return [
        Part(split=split, view=view, index=index, unit=plan.unit(index))
        for view in range(job.num_views)
        for index in range(job.num_parts)
        if job.name(view=view, index=index) not in done
    ]


def _finished(job: TokenJob) -> TokenSet | None:
    """Open the finished set, if there is one; refuse one of something else."""
    try:
        job.out.within(TOKENS_FILE).read()
    except FileNotFoundError:
        return None
    found = TokenSet.open(job.out)
    _check_same(found.made_of, job=job)
    return found


def _check_same(made_of: Mapping[str, Any], *, job: TokenJob) -> None:
    names = made_of.keys() | job.made_of.keys()
    other = [n for n in sorted(names) if made_of.get(n) != job.made_of.get(n)]
    if other:
        raise ValueError(
            f"{job.out}: expected tokens of this backbone and these images, got some "
            f"with another {', '.join(other)}; name another folder, or delete this one"
        )


@dataclass(frozen=True, kw_only=True)
class _Footer:
    num_rows: list[int]
    """Of each row group."""
    made_of: dict[str, Any]
    bad: list[tuple[int, str, str]]
    """Row, key and reason of each image that was left out."""


def _read_footers(job: TokenJob) -> dict[str, _Footer]:
    """Read the footers of the existing files, by file name."""
    filesystem, _ = job.out.open()

    def read(path: str) -> _Footer:
        metadata = retrying(
            lambda: pq.read_metadata(path, filesystem=filesystem), address=str(job.out)
        )
        said = metadata.metadata or {}
        try:
            return _Footer(
                num_rows=[
                    metadata.row_group(at).num_rows
                    for at in range(metadata.num_row_groups)
                ],
                made_of=json.loads(said[MADE_OF.encode()]),
                bad=[tuple(item) for item in json.loads(said[BAD.encode()])],
            )
        except (KeyError, ValueError) as error:
            raise ValueError(
                f"{path}: expected a file that write_tokens wrote, got another "
                f"({error!r}); name another folder"
            ) from error

    found = [item for item in job.out.entries() if item.path.endswith(".parquet")]
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        footers = pool.map(read, [item.path for item in found])
        return {
            item.base_name: footer for item, footer in zip(found, footers, strict=True)
        }


def _compute(
    parts: list[Part],
    *,
    jobs: Mapping[str, TokenJob],
    shards: Mapping[str, ShardSet],
    backbone: Backbone,
) -> None:
    """Write files, with a progress bar."""
    from tuning.heads.ray_extract import write_parts

    readings = {
        split: reading_of(shards[split], run=job.run) for split, job in jobs.items()
    }
    counts = write_parts(parts, jobs=jobs, readings=readings, backbone=backbone)
    num_images = sum(part.unit.num_rows for part in parts)
    with tqdm(total=num_images, desc="tokens", unit=" images", disable=None) as bar:
        for count in counts:
            bar.update(count)


def _conclude(shards: ShardSet, *, job: TokenJob) -> TokenSet:
    """Count the images written, log those left out, and finish the set."""
    footers = _read_footers(job)
    views = []
    bad: dict[int, tuple[str, str]] = {}
    for view in range(job.num_views):
        names = [job.name(view=view, index=index) for index in range(job.num_parts)]
        views.append({name: footers[name].num_rows for name in names})
        for name in names:
            bad |= {row: (key, why) for row, key, why in footers[name].bad}
    for row, (key, reason) in sorted(bad.items()):
        shard = shards.groups.path_of(row)
        logger.warning("%s of %s left out: %s", key, shard, reason)
    check_bad_share(
        len(bad),
        num_images=shards.groups.total_rows,
        max_share=job.run.data.max_bad_share,
    )
    found = TokenSet(
        place=job.out,
        shape=job.shape,
        classes=shards.classes,
        num_images=sum(sum(of_file) for of_file in views[0].values()),
        num_bad=len(bad),
        made_of=job.made_of,
        views=tuple(views),
    )
    found.save()
    return found


def _summary(tokens: TokenSet) -> str:
    return (
        f"{tokens.num_images:,} images in {tokens.num_views} views of {tokens.shape}, "
        f"{tokens.num_bytes * tokens.num_views / 1e6:,.0f} MB"
    )
