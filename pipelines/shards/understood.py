"""Report how a source was understood, and what became of its images."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from pipelines.shards.listing import Listing, printable
from pipelines.shards.stored import suffix

# More left out than this is not a bad file here and there.
_MANY = 0.05
_FEW_NAMES = 8
_DETAILS = re.compile(r": |, it begins with ")

Report = dict[str, Any]


def describe(listing: Listing) -> Report:
    """Describe the listing for report.json."""
    return {
        "source": [printable(path) for path in listing.containers[:1000]],
        "layout": listing.layout,
        "ignored": listing.ignored,
        "notes": listing.notes,
    }


def class_counts(listing: Listing, *, skipped: Sequence[int]) -> list[list[Any]]:
    """Count each class's images, less those of the records in `skipped`."""
    labels = listing.records["label"].to_numpy()
    num = len(listing.classes)
    counts = np.bincount(labels, minlength=num)
    counts = counts - np.bincount(labels[list(skipped)], minlength=num)
    return [list(pair) for pair in zip(listing.classes, counts.tolist(), strict=True)]


def left_out(skipped: Sequence[Mapping[str, str]]) -> dict[str, int]:
    """Count left-out images by reason, the most frequent first.

    A reason's details are cut off, and its numbers are N; the suffixes of its files are
    named, the most frequent first.
    """
    suffixes: dict[str, Counter[str]] = {}
    for item in skipped:
        reason = _DETAILS.split(item["reason"])[0]
        reason = re.sub(r"(?<!\w)\d+", "N", reason)
        kind = suffix(item["key"].rpartition("/")[2])
        suffixes.setdefault(reason, Counter())[f".{kind}" if kind else ""] += 1
    found = Counter[str]()
    for reason, kinds in suffixes.items():
        names = [name for name, _ in kinds.most_common(3) if name]
        names += ["..."] if len(kinds) > 3 else []
        tail = f" ({', '.join(names)})" if names else ""
        found[f"{reason}{tail}"] = kinds.total()
    return dict(found.most_common())


def warnings_of(report: Report) -> Iterator[str]:
    """Yield warnings of what the user should look at."""
    yield from (f"note: {note}" for note in report["notes"])
    empty = [name for name, num in report["classes"] if not num]
    if empty:
        num = len(report["classes"])
        yield f"warning: no image in {len(empty):,} of {num:,} classes: {_some(empty)}"
    if len(report["classes"]) == 1:
        name = report["classes"][0][0]
        yield f"warning: there is one class, {name!r}: nothing to learn"
    share = share_left_out(report)
    if share > _MANY:
        counts = _counts(report["left_out"])
        yield f"warning: {share:.0%} of the images were left out: {counts}"


def share_left_out(report: Report) -> float:
    """Return the share of images that were left out."""
    num = report["num_rows"] + report["num_skipped"]
    return report["num_skipped"] / num if num else 0.0


def summarize(report: Report, *, out: str, num_shards: int, place: str) -> str:
    """Summarize in a few lines what a set was made of."""
    lines = []
    if "classes" in report:  # a set of an older version has no more than the counts
        source = report["source"]
        first = source[0] if len(source) == 1 else f"{source[0]} and {len(source) - 1}"
        more = "" if len(source) == 1 else " more"
        lines.append(f"source    {report['layout']}: {first}{more}")
        lines.append(f"classes   {_classes(report['classes'])}")
    lines.append(
        f"rows      {report['num_rows']:,} rows in {num_shards:,} shards in {out}"
    )
    counts = _counts(report.get("left_out", {}))
    lines.append(
        f"left out  {report['num_skipped']:,} images{counts and f': {counts}'}"
    )
    if report.get("ignored"):
        num = sum(report["ignored"].values())
        lines.append(f"ignored   {num:,}: {_counts(report['ignored'])}")
    lines.append(f"report    {place}, with the name of each image that was left out")
    return "\n".join(lines)


def _classes(counts: Sequence[Sequence[Any]]) -> str:
    parts = [f"{name} {num:,}" for name, num in counts]
    if len(parts) <= _FEW_NAMES:
        return f"{len(parts)}, with their images: {', '.join(parts)}"
    nums = [num for _, num in counts]
    shown = ", ".join([*parts[:3], "...", parts[-1]])
    return f"{len(parts):,} of {min(nums):,} to {max(nums):,} images: {shown}"


def _counts(found: Mapping[str, int]) -> str:
    parts = [f"{num:,} {reason}" for reason, num in list(found.items())[:5]]
    return ", ".join(parts + ["..."] * (len(found) > 5))


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:5]))
    return shown + ", ..." * (len(names) > 5)
