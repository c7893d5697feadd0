"""Look at all images of a folder: their sizes, which show the same, who is held out."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from pipelines.shards.alike import Look, groups_of, look_at
from pipelines.shards.build import read_file
from pipelines.shards.listing import Listing
from pipelines.shards.making import watch
from pipelines.shards.planning import Done
from pipelines.shards.share import held_out_rows
from pipelines.shards.state import NUM_THREADS
from pipelines.shards.stored import child
from pipelines.storage.path import StoragePath
from pipelines.storage.retry import is_remote
from pipelines.transforms.headers import BadImageError

_AT_A_TIME = 4096
_FEW = 5


@dataclass(frozen=True, kw_only=True)
class Understood:
    """The sets that a folder becomes, and what to say of them."""

    listings: dict[str, Listing]
    """Of "train" and "val"."""
    short_side: int
    """Median of the images' shorter sides in pixels."""
    lines: list[str]

    @property
    def num_classes(self) -> int:
        """Number of classes, those without an image too."""
        return len(next(iter(self.listings.values())).classes)


def understand(
    listings: Mapping[str, Listing], *, share: float, seed: int
) -> Understood:
    """Look at all images, and hold out a share of "train" unless it is 0.

    Raises ValueError where no image is whole, and where none can be held out.
    """
    looks = {side: _look_at_all(listing) for side, listing in listings.items()}
    sides = [
        min(look.width, look.height) for of in looks.values() for look in of if look
    ]
    if not sides:
        root = next(iter(listings.values())).containers[0]
        raise ValueError(
            f"expected images in {root}, got files that are none; see that they open"
        )
    lines = list(_described(listings, sides=sides))
    found = dict(listings)
    if share:
        found, more = _parted(
            listings["train"], looks=looks["train"], share=share, seed=seed
        )
        lines += more
    elif len(listings) > 1:
        lines += _overlap(listings, looks=looks)
    return Understood(listings=found, short_side=int(np.median(sides)), lines=lines)


def _look_at_all(listing: Listing) -> list[Look | None]:
    """Look at every image; None of one that is bad, which a later check names."""
    keys = listing.records["key"].to_pylist()
    looks: list[Look | None] = []
    done = _looking(listing.containers[0], keys=keys, looks=looks)
    for _ in watch(done, num_images=len(keys), verb="looking"):
        pass
    return looks


def _looking(
    root: str, *, keys: Sequence[str], looks: list[Look | None]
) -> Iterator[Done]:
    def look(key: str) -> Look | None:
        content = read_file(StoragePath(child(root, key)))
        try:
            return None if isinstance(content, BadImageError) else look_at(content)
        except BadImageError:
            return None

    num_threads = NUM_THREADS if is_remote(root) else os.cpu_count() or 1
    with ThreadPoolExecutor(num_threads) as pool:
        for start in range(0, len(keys), _AT_A_TIME):
            for found in pool.map(look, keys[start : start + _AT_A_TIME]):
                looks.append(found)
                yield Done(num_rows=1, num_skipped=0)


def _described(
    listings: Mapping[str, Listing], *, sides: Sequence[int]
) -> Iterator[str]:
    for side, listing in listings.items():
        counts = np.bincount(
            listing.records["label"].to_numpy(), minlength=len(listing.classes)
        )
        yield (
            f"{'held out: ' if side == 'val' else ''}{len(listing.records):,} images "
            f"of {len(listing.classes):,} classes ({_some(listing.classes)}), "
            f"{counts.min():,} to {counts.max():,} of each"
        )
        for reason, num in listing.ignored.items():
            yield f"ignored: {num:,} {reason}"
    yield (
        f"their shorter sides have {min(sides):,} to {max(sides):,} pixels, half of "
        f"them {int(np.median(sides)):,} or more"
    )


def _parted(
    listing: Listing, *, looks: Sequence[Look | None], share: float, seed: int
) -> tuple[dict[str, Listing], list[str]]:
    """Hold out a share of a listing's images, and say which way that went."""
    keys = listing.records["key"].to_pylist()
    labels = listing.records["label"].to_numpy()
    good = np.array([at for at, look in enumerate(looks) if look is not None])
    names = [keys[at] for at in good.tolist()]
    groups = groups_of([look for look in looks if look is not None])
    chosen = np.zeros(len(keys), dtype=bool)
    chosen[good] = held_out_rows(
        labels[good],
        groups=groups,
        keys=names,
        share=share,
        seed=seed,
    )
    if not chosen.any():
        raise ValueError(
            f"expected a class of at least 2 different images to hold one out in "
            f"{listing.containers[0]}, got {len(keys):,} of one or alike; add images, "
            "or set --validation.no-held-out"
        )
    lines = [
        f"held out: {chosen.sum():,} images, {share:.0%} of each class by the seed "
        f"{seed}; {(~chosen).sum():,} are trained on"
    ]
    held = set(labels[chosen].tolist())
    if without := [name for at, name in enumerate(listing.classes) if at not in held]:
        lines.append(
            f"nothing is held out of {len(without):,} classes of one image, or of "
            f"images alike: {_some(without)}"
        )
    copies = _copies(groups, names=names)
    if copies:
        lines.append(copies)
    # What was left out while listing is reported once.
    val = dataclasses.replace(
        listing, records=listing.records.filter(pa.array(chosen)), skipped=[], notes=[]
    )
    train = dataclasses.replace(
        listing, records=listing.records.filter(pa.array(~chosen))
    )
    return {"train": train, "val": val}, lines


def _copies(groups: np.ndarray, *, names: Sequence[str]) -> str:
    numbers, counts = np.unique(groups, return_counts=True)
    repeated = numbers[counts > 1]
    if not len(repeated):
        return ""
    first = [names[at] for at in np.flatnonzero(groups == repeated[0]).tolist()]
    return (
        f"{counts[counts > 1].sum():,} images are copies of one another or nearly so, "
        f"in {len(repeated):,} groups that stay on one side, such as {_some(first, 2)}"
    )


def _overlap(
    listings: Mapping[str, Listing], *, looks: Mapping[str, Sequence[Look | None]]
) -> list[str]:
    """Warn of held-out images that are trained on too, in the user's own parts."""
    good = [
        (side, key, look)
        for side, of_side in looks.items()
        for key, look in zip(
            listings[side].records["key"].to_pylist(), of_side, strict=True
        )
        if look is not None
    ]
    groups = groups_of([look for _, _, look in good]).tolist()
    trained = {
        group: key
        for group, (side, key, _) in zip(groups, good, strict=True)
        if side == "train"
    }
    shared = [
        (key, trained[group])
        for group, (side, key, _) in zip(groups, good, strict=True)
        if side == "val" and group in trained
    ]
    if not shared:
        return []
    return [
        f"warning: {len(shared):,} held-out images are trained on too, or nearly so, "
        f"which flatters the accuracy: {shared[0][0]!r} is like {shared[0][1]!r}"
    ]


def _some(names: Sequence[str], num: int = _FEW) -> str:
    return ", ".join(names[:num]) + ", ..." * (len(names) > num)
