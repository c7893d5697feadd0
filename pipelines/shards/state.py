"""Manage a shard set's folder while many processes make it, a shard at a time.

The folder's state is its files, each put into place when it is whole: `_plan.json`
says what is being made, `_records.arrow` holds all records in their final order, a
batch a shard, and a shard's footer carries the plan's digest and what was left out of
it. So work that was interrupted goes on, and no shard can be of another plan. The
folder may be in a bucket; what is unpacked on the way lies on a path.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.fs as pafs

from pipelines.data.shard_set import CLASSES_FILE, cut_evenly, write_json
from pipelines.rng import seeded_order
from pipelines.shards.listing import RECORD_SCHEMA, Listing, Skipped, printable
from pipelines.shards.planning import UNPACKED_FOLDER, Done, Plan
from pipelines.shards.stored import child
from pipelines.shards.understood import Report, class_counts, describe, left_out
from pipelines.storage.path import PARTIAL_SUFFIX, StoragePath
from pipelines.storage.retry import retrying

logger = logging.getLogger(__name__)

PLAN_FILE = "_plan.json"
RECORDS_FILE = "_records.arrow"
REPORT_FILE = "report.json"
NUM_THREADS = 16


def open_out(plan: Plan, *, listing: Listing, overwrite: bool = False) -> bool:
    """Prepare the folder; return whether its set is finished already.

    Raises:
        ValueError: The folder holds something else, or a set of another plan.
    """
    out = plan.out
    kind = out.kind()
    if kind == pafs.FileType.File:
        raise ValueError(
            f"expected a folder to write to, got {out}, a file; name another"
        )
    if kind == pafs.FileType.NotFound:
        out.check_bucket()
    if overwrite:
        clear(plan)
    found = _read_plan(out)
    if found and found["digest"] != plan.digest:
        raise ValueError(
            f"{out} holds a set of another source or other options: "
            f"{_difference(found, plan)}. Use the same, another OUT, or --overwrite."
        )
    if found and _is_finished(plan):
        _clear_unpacked(plan)
        return True
    if found:
        logger.info("going on with the set in %s", out)
    _make_folders(plan)
    write_json(out.within(PLAN_FILE), value=_describe(plan))
    write_json(out.within(CLASSES_FILE), value=listing.classes)
    _write_records(plan, listing=listing)
    return False


def _make_folders(plan: Plan) -> None:
    """Make missing folders, and delete files that a killed process left incomplete."""
    plan.out.make_folder()
    for name in _names(plan.out):
        if name.endswith(PARTIAL_SUFFIX):
            plan.out.within(name).delete()
    if plan.scratch is not None:
        plan.scratch.mkdir(parents=True, exist_ok=True)
        for partial in plan.scratch.glob(f"*{PARTIAL_SUFFIX}"):
            partial.unlink(missing_ok=True)


def _clear_unpacked(plan: Plan) -> None:
    folders = [] if plan.scratch is None else [plan.scratch]
    if not plan.out.is_remote:  # also what a run with other options left
        folders.append(Path(plan.out.open()[1]) / UNPACKED_FOLDER)
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def _names(folder: StoragePath) -> list[str]:
    try:
        return [entry.base_name for entry in folder.entries()]
    except FileNotFoundError:
        return []


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


def _read_plan(out: StoragePath) -> dict[str, object]:
    if all(name.endswith(PARTIAL_SUFFIX) for name in _names(out)):
        return {}
    try:
        found = json.loads(out.within(PLAN_FILE).read())
        return {"digest": found["digest"], "name": found["name"], **found}
    except ConnectionError:
        raise
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(
            f"{out} is not empty and not a set that this command began: name another "
            "folder."
        ) from None


def clear(plan: Plan) -> None:
    """Delete the set in OUT that this command made, its plan last, and nothing else."""
    out = plan.out
    found = _read_plan(out)
    if not found:
        return
    pattern = re.compile(rf"{re.escape(str(found['name']))}-\d+-of-\d+\.parquet")
    shards = [name for name in _names(out) if pattern.fullmatch(name)]
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        list(pool.map(lambda name: out.within(name).delete(), shards))
    _clear_unpacked(plan)
    for name in (REPORT_FILE, CLASSES_FILE, RECORDS_FILE, PLAN_FILE):
        out.within(name).delete()


def _is_finished(plan: Plan) -> bool:
    report = plan.out.within(REPORT_FILE)
    if report.kind() == pafs.FileType.NotFound or pending_shards(plan):
        return False
    return json.loads(report.read())["digest"] == plan.digest


def _write_records(plan: Plan, *, listing: Listing) -> None:
    order = seeded_order(plan.num_rows, key=plan.recipe.seed)
    records = listing.records.take(order).append_column("listed", pa.array(order))
    bounds = cut_evenly(plan.num_rows, num_parts=plan.num_shards)
    with (
        plan.out.within(RECORDS_FILE).writing() as path,
        pa.ipc.new_file(str(path), records.schema) as writer,
    ):
        for start, stop in pairwise(bounds):
            of_shard = records.slice(start, stop - start).combine_chunks()
            writer.write_table(of_shard)


def read_records(plan: Plan, *, shard: int) -> pa.Table:
    """Read the records of one shard, in the order of its rows.

    Raises ValueError where the file is not what this command wrote.
    """
    file = plan.out.within(RECORDS_FILE)
    filesystem, path = file.open()

    def read() -> pa.Table:
        with filesystem.open_input_file(path) as source:
            batch = pa.ipc.open_file(source).get_batch(shard)
            return pa.Table.from_batches([batch])

    records = retrying(read, address=str(file))
    # Reading a type of Ray's own would unpickle.
    if records.schema.types != [*RECORD_SCHEMA.types, pa.int64()]:
        raise ValueError(f"{file} is not what this command wrote: use --overwrite.")
    return records


def pending_shards(plan: Plan) -> list[int]:
    """List the shards that are not there, or are of another plan."""
    return [i for i, found in enumerate(_read_footers(plan)) if found is None]


@dataclass(frozen=True)
class _Footer:
    """Contents of a shard's footer."""

    num_rows: int
    skipped: list[tuple[int, str]]


def _read_footers(plan: Plan) -> list[_Footer | None]:
    try:
        sizes_bytes = {entry.base_name: entry.size for entry in plan.out.entries()}
    except FileNotFoundError:
        sizes_bytes = {}
    shards = [plan.shard(index) for index in range(plan.num_shards)]
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        return list(
            pool.map(lambda file: _read_footer(plan, file, sizes_bytes), shards)
        )


def _read_footer(
    plan: Plan, file: StoragePath, sizes_bytes: dict[str, int]
) -> _Footer | None:
    filesystem, path = file.open()
    size_bytes = sizes_bytes.get(path.rpartition("/")[2])
    if size_bytes is None:
        return None
    # Told the size, a fragment needs one request: the file's end.
    fragment = ds.ParquetFileFormat().make_fragment(
        path, filesystem=filesystem, file_size=size_bytes
    )
    try:
        footer = retrying(lambda: fragment.metadata, address=str(file))
    except (FileNotFoundError, pa.ArrowInvalid):
        return None
    said = footer.metadata or {}
    if said.get(b"digest", b"").decode() != plan.digest:
        return None
    return _Footer(footer.num_rows, skipped=json.loads(said[b"skipped"]))


def finish(plan: Plan, *, listing: Listing) -> Report:
    """Write the report from the shards' footers, and clear the work files."""
    skipped = list(listing.skipped)
    num_rows, places = 0, list[int]()
    for shard, footer in enumerate(_read_footers(plan)):
        assert footer is not None, plan.shard(shard)
        num_rows += footer.num_rows
        for place, reason in footer.skipped:
            places.append(place)
            skipped.append(_name_skipped(listing, place=place, reason=reason))
    assert num_rows + len(skipped) == plan.num_rows + len(listing.skipped)
    skipped.sort(key=lambda item: item.key)
    named = [asdict(item) for item in skipped]
    report: Report = {
        "digest": plan.digest,
        **asdict(Done(num_rows=num_rows, num_skipped=len(skipped))),
        **describe(listing),
        "classes": class_counts(listing, skipped=places),
        "left_out": left_out(named),
        "skipped": named,
    }
    write_json(plan.out.within(REPORT_FILE), value=report)
    _clear_unpacked(plan)
    plan.out.within(RECORDS_FILE).delete()
    return report


def _name_skipped(listing: Listing, *, place: int, reason: str) -> Skipped:
    record = listing.records.slice(place, 1).to_pylist()[0]
    container = printable(listing.containers[record["container"]])
    if listing.kind == "folder":
        source = child(container, record["key"])
    else:
        unit = "row" if listing.kind == "parquet" else "byte"
        source = f"{container}, {unit} {record['offset']}"
    return Skipped(record["key"], source=source, reason=reason)


def read_report(plan: Plan) -> Report:
    """Read the report of a finished set."""
    return json.loads(plan.out.within(REPORT_FILE).read())
