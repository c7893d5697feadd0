"""Turns a listing into a shard set, a shard at a time, in any number of processes.

The folder's state is its files, each renamed into place when it is whole:
`_plan.json` says what is being made, `_records.arrow` holds all records in their final
order, and a shard's footer carries the plan's digest and what was left out of it. So
work that was interrupted goes on, and no shard can be of another plan.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.hashing import seeded_order
from pipelines.shards.format import (
    CLASSES_FILE,
    PARTIAL_SUFFIX,
    ROWS_PER_GROUP,
    cut_evenly,
    partial_path,
    shard_name,
    write_json,
)
from pipelines.shards.listing import Listing, Skipped

logger = logging.getLogger(__name__)

PLAN_FILE = "_plan.json"
RECORDS_FILE = "_records.arrow"
UNPACKED_FOLDER = "_unpacked"
REPORT_FILE = "report.json"
BYTES_PER_SHARD = 128 * 2**20
MIN_SHARDS = 8


@dataclass(frozen=True)
class Recipe:
    """How images become rows; part of the plan's digest.

    Attributes:
        seed: Of the order of all rows.
        num_shards: None for shards of about 128 MiB, and at least 8.
        rows_per_group: Most rows of a row group, which also ends at 4 MiB.
        check: "full" decodes every image; "header" misses what is broken within.
        short_side: Re-encode images whose shorter side has more pixels.
        quality: JPEG quality of those.
    """

    seed: int = 0
    num_shards: int | None = None
    rows_per_group: int = ROWS_PER_GROUP
    check: Literal["full", "header"] = "full"
    short_side: int | None = None
    quality: int = 90

    def __post_init__(self) -> None:
        for name in ("num_shards", "rows_per_group", "short_side"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"Wanted {name} of at least 1, got {value}.")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"Wanted a quality from 1 to 100, got {self.quality}.")


@dataclass(frozen=True)
class Plan:
    """All that a process needs to make one shard; small enough to send around."""

    out: Path
    name: str
    kind: str
    containers: tuple[str, ...]
    num_rows: int
    num_shards: int
    digest: str
    recipe: Recipe

    def shard_path(self, index: int) -> Path:
        """Give the place of one shard."""
        name = shard_name(self.name, index=index, num_shards=self.num_shards)
        return self.out / name

    def blob_path(self, container: int) -> Path:
        """Give the place of one unpacked Parquet file."""
        return self.out / UNPACKED_FOLDER / f"{container:05d}.bin"


@dataclass(frozen=True)
class Done:
    """What one shard came to."""

    num_rows: int
    num_skipped: int


def make_plan(listing: Listing, *, out: Path, name: str, recipe: Recipe) -> Plan:
    """Decide on the shards, and digest everything that their bytes depend on."""
    num_rows = len(listing.records)
    num_shards = recipe.num_shards
    if num_shards is None:
        total_bytes = int(np.sum(listing.records["size_bytes"].to_numpy()))
        num_shards = max(MIN_SHARDS, -(-total_bytes // BYTES_PER_SHARD))
    num_shards = min(num_shards, num_rows)
    options = json.dumps([name, num_shards, asdict(recipe)], sort_keys=True)
    return Plan(
        out=out,
        name=name,
        kind=listing.kind,
        containers=tuple(listing.containers),
        num_rows=num_rows,
        num_shards=num_shards,
        digest=hashlib.sha256(f"{listing.digest()}{options}".encode()).hexdigest(),
        recipe=recipe,
    )


def open_out(plan: Plan, *, listing: Listing, overwrite: bool = False) -> bool:
    """Make the folder ready, and say whether its set is finished already.

    Raises:
        ValueError: The folder holds something else, or a set of another plan.
    """
    out = plan.out
    if out.exists() and not out.is_dir():
        raise ValueError(f"Wanted a folder to write to, but {out} is a file.")
    if overwrite and out.exists():
        clear(out)
    found = _read_plan(out)
    if found and found["digest"] != plan.digest:
        raise ValueError(
            f"{out} holds a set of another source or other options: "
            f"{_difference(found, plan)}. Use the same, another OUT, or --overwrite."
        )
    if found and _is_finished(plan):
        shutil.rmtree(out / UNPACKED_FOLDER, ignore_errors=True)
        return True
    if found:
        logger.info("going on with the set in %s", out)
    out.mkdir(parents=True, exist_ok=True)
    for partial in out.rglob(f"*{PARTIAL_SUFFIX}"):
        partial.unlink(missing_ok=True)
    write_json(out / PLAN_FILE, value=_describe(plan))
    write_json(out / CLASSES_FILE, value=listing.classes)
    _write_records(plan, listing=listing)
    return False


def _describe(plan: Plan) -> dict[str, object]:
    return {
        "digest": plan.digest,
        "name": plan.name,
        "num_images": plan.num_rows,
        **asdict(plan.recipe),
        "num_shards": plan.num_shards,
    }


def _difference(found: dict[str, object], plan: Plan) -> str:
    wanted = _describe(plan)
    changed = [k for k in wanted if k != "digest" and found.get(k) != wanted[k]]
    parts = [f"{k} was {found.get(k)!r}, is {wanted[k]!r}" for k in changed]
    return "; ".join(parts) or "the source's files, labels or classes changed"


def _read_plan(out: Path) -> dict[str, object]:
    names = [entry.name for entry in out.iterdir()] if out.exists() else []
    if all(name.endswith(PARTIAL_SUFFIX) for name in names):
        return {}
    try:
        found = json.loads((out / PLAN_FILE).read_text(encoding="utf-8"))
        return {"digest": found["digest"], "name": found["name"], **found}
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(
            f"{out} is not empty and not a set that this command began: name another "
            "folder."
        ) from None


def clear(out: Path) -> None:
    """Delete a set that this command made, its plan last, and no other file."""
    name = _read_plan(out).get("name", "")
    for path in out.glob("*-of-*.parquet"):
        if re.fullmatch(rf"{re.escape(str(name))}-\d+-of-\d+\.parquet", path.name):
            path.unlink()
    shutil.rmtree(out / UNPACKED_FOLDER, ignore_errors=True)
    for name in (REPORT_FILE, CLASSES_FILE, RECORDS_FILE, PLAN_FILE):
        (out / name).unlink(missing_ok=True)


def _is_finished(plan: Plan) -> bool:
    path = plan.out / REPORT_FILE
    if not path.exists() or pending_shards(plan):
        return False
    return json.loads(path.read_text(encoding="utf-8"))["digest"] == plan.digest


def _write_records(plan: Plan, *, listing: Listing) -> None:
    order = seeded_order(plan.num_rows, key=plan.recipe.seed)
    records = listing.records.take(order).append_column("listed", pa.array(order))
    path = plan.out / RECORDS_FILE
    partial = partial_path(path)
    with pa.ipc.new_file(str(partial), records.schema) as writer:
        writer.write_table(records)
    os.replace(partial, path)


def read_records(plan: Plan, *, shard: int) -> pa.Table:
    """Read the records of one shard, in the order of its rows."""
    bounds = cut_evenly(plan.num_rows, num_parts=plan.num_shards)
    with pa.memory_map(str(plan.out / RECORDS_FILE)) as source:
        table = pa.ipc.open_file(source).read_all()
    return table.slice(bounds[shard], bounds[shard + 1] - bounds[shard])


def pending_shards(plan: Plan) -> list[int]:
    """List the shards that are not there, or are of another plan."""
    return [i for i in range(plan.num_shards) if _footer(plan, shard=i) is None]


def _footer(plan: Plan, *, shard: int) -> pq.FileMetaData | None:
    try:
        footer = pq.read_metadata(plan.shard_path(shard))
    except (FileNotFoundError, pa.ArrowInvalid):
        return None
    text = (footer.metadata or {}).get(b"digest", b"")
    return footer if text.decode() == plan.digest else None


def finish(plan: Plan, *, listing: Listing) -> Done:
    """Write the report out of the shards' footers, and clear the work files."""
    skipped = list(listing.skipped)
    num_rows = 0
    for shard in range(plan.num_shards):
        footer = _footer(plan, shard=shard)
        assert footer is not None, plan.shard_path(shard)
        num_rows += footer.num_rows
        for place, reason in json.loads(footer.metadata[b"skipped"]):
            skipped.append(_name_skipped(listing, place=place, reason=reason))
    assert num_rows + len(skipped) == plan.num_rows + len(listing.skipped)
    done = Done(num_rows=num_rows, num_skipped=len(skipped))
    skipped.sort(key=lambda item: item.key)
    report = {"digest": plan.digest, **asdict(done)}
    write_json(
        plan.out / REPORT_FILE,
        value=report | {"skipped": [asdict(item) for item in skipped]},
    )
    shutil.rmtree(plan.out / UNPACKED_FOLDER, ignore_errors=True)
    (plan.out / RECORDS_FILE).unlink(missing_ok=True)
    return done


def _name_skipped(listing: Listing, *, place: int, reason: str) -> Skipped:
    record = listing.records.slice(place, 1).to_pylist()[0]
    container = listing.containers[record["container"]]
    if listing.kind == "folder":
        source = str(Path(container) / record["key"])
    else:
        unit = "byte" if listing.kind == "tar" else "row"
        source = f"{container}, {unit} {record['offset']}"
    return Skipped(record["key"], source=source, reason=reason)


def read_report(plan: Plan) -> Done:
    """Read the counts of a finished set."""
    report = json.loads((plan.out / REPORT_FILE).read_text(encoding="utf-8"))
    return Done(num_rows=report["num_rows"], num_skipped=report["num_skipped"])
