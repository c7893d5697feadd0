"""Plan the shards that a listing becomes."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from pipelines.data.shard_set import ROWS_PER_GROUP, shard_name
from pipelines.shards.listing import USUAL_FIELDS, Fields, Listing
from pipelines.storage.path import StoragePath

UNPACKED_FOLDER = "_unpacked"
BYTES_PER_SHARD = 128 * 2**20
MIN_SHARDS = 8


@dataclass(frozen=True)
class Recipe:
    """Options that decide how images become rows; part of the plan's digest.

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
                raise ValueError(f"expected {name} of at least 1, got {value}")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"expected a quality from 1 to 100, got {self.quality}")


@dataclass(frozen=True)
class Plan:
    """Everything that a process needs to make one shard; small enough to send."""

    out: StoragePath
    scratch: Path | None
    """Folder for files unpacked on the way; None where nothing is."""
    name: str
    kind: str
    containers: tuple[str, ...]
    num_rows: int
    num_shards: int
    digest: str
    recipe: Recipe
    fields: Fields = USUAL_FIELDS

    def shard(self, index: int) -> StoragePath:
        """Return the place of one shard."""
        name = shard_name(self.name, index=index, num_shards=self.num_shards)
        return self.out.within(name)

    def blob_path(self, container: int) -> Path:
        """Return the path of one unpacked Parquet file."""
        assert self.scratch is not None
        return self.scratch / f"{container:05d}.bin"


@dataclass(frozen=True)
class Done:
    """Counts of one shard's rows and of images left out."""

    num_rows: int
    num_skipped: int


def make_plan(
    listing: Listing,
    *,
    out: StoragePath,
    name: str,
    recipe: Recipe,
    scratch: Path | None = None,
) -> Plan:
    """Decide on the shards, and digest everything that their bytes depend on.

    Raises:
        ValueError: There is no place to unpack the source to.
    """
    num_rows = len(listing.records)
    num_shards = recipe.num_shards
    if num_shards is None:
        total_bytes = int(np.sum(listing.records["size_bytes"].to_numpy()))
        num_shards = max(MIN_SHARDS, -(-total_bytes // BYTES_PER_SHARD))
    num_shards = min(num_shards, num_rows)
    options = json.dumps([name, num_shards, asdict(recipe)], sort_keys=True)
    if listing.fields != USUAL_FIELDS:
        options += json.dumps(asdict(listing.fields))
    digest = hashlib.sha256(f"{listing.digest()}{options}".encode()).hexdigest()
    return Plan(
        out=out,
        scratch=_unpacked(listing, out=out, scratch=scratch, digest=digest),
        name=name,
        kind=listing.kind,
        containers=tuple(listing.containers),
        num_rows=num_rows,
        num_shards=num_shards,
        digest=digest,
        recipe=recipe,
        fields=listing.fields,
    )


def _unpacked(
    listing: Listing, *, out: StoragePath, scratch: Path | None, digest: str
) -> Path | None:
    if listing.kind != "parquet":
        return None
    if scratch is not None:  # other sets may be made there at the same time
        return scratch / f"{UNPACKED_FOLDER}-{digest[:16]}"
    if out.is_remote:
        raise ValueError(
            f"Parquet files are unpacked before {out} is written: name a folder with "
            "room for all images, which every machine sees, by --scratch."
        )
    return Path(out.open()[1]) / UNPACKED_FOLDER
