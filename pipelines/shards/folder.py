"""Shards of a folder of images as it lies: made once, found again, anew if it changed.

A set lies beside the runs, in STORAGE/shards/NAME-DIGEST. The digest is of the images'
paths, sizes and times and of what decides which of them are held out, so that a changed
folder becomes another set, and runs that were trained on the one before keep theirs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow.fs as pafs

from pipelines.data.shard_set import CLASSES_FILE, write_json
from pipelines.shards.listing import Listing
from pipelines.shards.making import in_threads, make_set
from pipelines.shards.names import is_litter, is_split, split_of
from pipelines.shards.planning import Recipe
from pipelines.shards.sources import list_source
from pipelines.shards.state import PLAN_FILE
from pipelines.shards.stored import base_name, child
from pipelines.shards.understanding import Understood, understand
from pipelines.storage.filesystem import absolute, parent_address
from pipelines.storage.lease import claimed
from pipelines.storage.path import StoragePath
from pipelines.storage.retry import is_remote, retrying

logger = logging.getLogger(__name__)

SETS_FOLDER = "shards"
"""Folder beside the runs."""
SETS_FILE = "folder.json"
DEFAULT_SHARE = 0.1
_VERSION = 1
_DIGEST_CHARS = 12
# Another command makes the same set: it is waited for.
_PATIENCE_S = 3600.0
_SIDES = ("train", "val")
_OF_SHARDS = re.compile(r"--(?!data\.|storage)\w")


@dataclass(frozen=True, kw_only=True)
class FolderSets:
    """Shard sets of a folder of images, and what a recipe may be fitted to."""

    train: str
    """Address of the set; "" where the training set was none of ours to make."""
    val: str
    """The same of what is held out; "" where nothing is."""
    num_train: int
    """Images of the training set; 0 where it was none of ours to make."""
    num_classes: int
    short_side: int
    """Median of the images' shorter sides in pixels."""


@dataclass(frozen=True, kw_only=True)
class FolderPlan:
    """What is to be made of a folder, or is there already.

    Attributes:
        place: Address of the folder of both sets.
        source: Where the images lie, for people.
        listings: Of "train", "val" or both.
        share: Of each class's images of "train" that are held out; 0 is none.
        seed: Of the choice.
        notes: How the folder was understood.
    """

    place: str
    source: str
    listings: dict[str, Listing]
    share: float
    seed: int
    notes: list[str] = field(default_factory=list)

    def found(self) -> FolderSets | None:
        """Read what was made before; None where it was not, or not to its end."""
        return _read_sets(self.place)


def read_folder_sets(train: str) -> FolderSets | None:
    """Read what a training set was made of; None where it is none of a folder's."""
    sets = _read_sets(parent_address(train)) if train else None
    return sets if sets and sets.train == train else None


def _read_sets(place: str) -> FolderSets | None:
    try:
        found = json.loads(StoragePath(place).within(SETS_FILE).read())
        sets = FolderSets(**found["sets"])
    except ConnectionError:
        raise
    except (OSError, ValueError, KeyError, TypeError):
        return None
    # The storage may have been moved since.
    moved = {name: child(place, name) for name in _SIDES if getattr(sets, name)}
    return dataclasses.replace(sets, **moved)


def is_shard_set(address: str) -> bool:
    """Check whether an address is a folder of shards."""
    file = StoragePath(absolute(address)).within(CLASSES_FILE)
    return file.kind() == pafs.FileType.File


def holds_images(address: str) -> bool:
    """Check whether an address is a folder of something else than shards."""
    if not address:
        return False
    try:
        entries = StoragePath(absolute(address)).entries()
    except (FileNotFoundError, NotADirectoryError):
        return False
    names = [entry.base_name for entry in entries]
    of_shards = {CLASSES_FILE, PLAN_FILE}
    if any(name in of_shards or name.endswith(".parquet") for name in names):
        return False
    return any(not is_litter(name) for name in names)


def plan_folder(
    *,
    train: str,
    val: str = "",
    share: float | None = None,
    holds_out: bool = True,
    seed: int = 0,
    classes: Sequence[str] | None = None,
    storage: str,
) -> FolderPlan:
    """Understand a folder of images without looking into them.

    Args:
        train: Folder of training images; "" where there is only one of held-out ones.
        val: Folder of held-out images, if any.
        share: Of each class to hold out where the folder has no such part itself.
        holds_out: Whether anything is held out.
        seed: Of the choice.
        classes: Class names in the order of their labels, where they are given.
        storage: Folder of the runs.

    Raises ValueError where a folder is none of classes or could be two things.
    """
    source = absolute(train or val)
    roots, notes = {"train": absolute(train)} if train else {}, []
    if val:
        roots["val"] = absolute(val)
    elif holds_out and train and (parts := _splits_of(roots["train"])):
        if share is not None:
            raise ValueError(
                f"data.val_share: expected images that are not split yet, got {source} "
                f"with {parts['train']} and {parts['val']} in it; leave out "
                f"--data.val-share, or set --data.train {roots['train']}/"
                f"{parts['train']}"
            )
        roots = {side: child(source, parts[side]) for side in _SIDES}
        notes.append(f"its {parts['train']} is trained on, its {parts['val']} held out")
        if unused := [name for kind, name in parts.items() if kind not in _SIDES]:
            notes.append(f"{unused[0]} is left alone")
    share = DEFAULT_SHARE if share is None else share
    if "val" in roots or not holds_out:
        share = 0.0
    listings: dict[str, Listing] = {}
    for side, root in roots.items():
        _refuse_within(root, storage=storage)
        with _options_explained():
            listings[side] = list_source(root, kind="folder", classes=classes)
        classes = classes or listings[side].classes
    if len(classes or ()) < 2:
        raise ValueError(
            f"expected images of at least 2 classes, a folder each, in {source}, got "
            f"{len(classes or ())}; add a folder of another class"
        )
    digest = _digest(listings, share=share, seed=seed)
    name = re.sub(r"[^\w.-]+", "-", base_name(source)).strip(".-") or "images"
    sets = child(absolute(storage), SETS_FOLDER)
    return FolderPlan(
        place=child(sets, f"{name}-{digest[:_DIGEST_CHARS]}"),
        source=str(StoragePath(source)),
        listings=listings,
        share=share,
        seed=seed,
        notes=notes,
    )


def make_folder_sets(plan: FolderPlan) -> FolderSets:
    """Make the shard sets of a folder, or find those that were made before.

    Raises:
        ValueError: The images changed meanwhile, or another command is at it too long.
        OSError: Something cannot be read or written.
    """
    if sets := plan.found():
        logger.info("shards of %s are there: %s", plan.source, _shown(plan))
        return sets
    logger.info("making shards of %s, once, in %s", plan.source, _shown(plan))
    with claimed(StoragePath(plan.place), patience_s=_PATIENCE_S):
        if sets := plan.found():  # by whom we waited for
            return sets
        understood = understand(plan.listings, share=plan.share, seed=plan.seed)
        for line in (*plan.notes, *understood.lines):
            logger.info(line)
        num_train = 0
        for side, listing in understood.listings.items():
            with _options_explained():
                summary = make_set(
                    listing,
                    out=StoragePath(child(plan.place, side)),
                    name=side,
                    recipe=Recipe(),
                    execute=in_threads,
                )
            if side == "train":
                num_train = summary.report["num_rows"]
            if num_bad := summary.report["num_skipped"]:
                logger.info(
                    "%s: %s images left out, named in %s",
                    side,
                    f"{num_bad:,}",
                    StoragePath(child(plan.place, side)).within("report.json"),
                )
        sets = _sets_of(plan, understood, num_train=num_train)
        content = {"source": plan.source, "sets": dataclasses.asdict(sets)}
        write_json(StoragePath(plan.place).within(SETS_FILE), value=content)
    return sets


def sets_to_be(plan: FolderPlan) -> tuple[FolderSets, list[str]]:
    """Look at the images and say what would be made of them; nothing is written."""
    understood = understand(plan.listings, share=plan.share, seed=plan.seed)
    train = understood.listings.get("train")
    sets = _sets_of(plan, understood, num_train=len(train.records) if train else 0)
    return sets, [*plan.notes, *understood.lines]


def _sets_of(plan: FolderPlan, understood: Understood, *, num_train: int) -> FolderSets:
    def address(side: str) -> str:
        return child(plan.place, side) if side in understood.listings else ""

    return FolderSets(
        train=address("train"),
        val=address("val"),
        num_train=num_train,
        num_classes=understood.num_classes,
        short_side=understood.short_side,
    )


def _shown(plan: FolderPlan) -> str:
    return str(StoragePath(plan.place))


def _splits_of(root: str) -> dict[str, str]:
    """Find the folders of a split within a folder of nothing else.

    Raises ValueError where there is no telling which part is held out.
    """
    tops = [
        entry.base_name
        for entry in StoragePath(root).entries()
        if entry.type == pafs.FileType.Directory and not is_litter(entry.base_name)
    ]
    parts = {str(split_of(name)): name for name in tops if is_split(name)}
    if len(parts) < len(tops) or not {"train", "val", "test"} >= set(parts):
        return {}
    if set(parts) == {"train", "test"}:
        train, test = (child(root, parts[kind]) for kind in ("train", "test"))
        raise ValueError(
            f"expected train and val, or classes, in {root}, got {parts['train']} and "
            f"{parts['test']}; give --data.train {train} with --data.val {test}, or "
            "alone to hold out a share of it"
        )
    return parts if {"train", "val"} <= set(parts) else {}


def _refuse_within(root: str, *, storage: str) -> None:
    place = absolute(storage)
    if f"{place.rstrip('/')}/".startswith(f"{root.rstrip('/')}/"):
        raise ValueError(
            f"storage: expected a folder outside the images, got {storage!r} within "
            f"{root!r}; set --storage"
        )


@contextlib.contextmanager
def _options_explained() -> Iterator[None]:
    """Add to an error that names options of sovit-shards that they are its own."""
    try:
        yield
    except ValueError as error:
        if not _OF_SHARDS.search(str(error)):
            raise
        raise ValueError(
            f"{error} These are options of sovit-shards: make shards of the folder "
            "with it, and give them to --data.train."
        ) from error


def _digest(listings: dict[str, Listing], *, share: float, seed: int) -> str:
    options = [_VERSION, share, seed if share else 0, sorted(listings)]
    digest = hashlib.sha256(json.dumps(options).encode())
    for side in sorted(listings):
        digest.update(listings[side].digest().encode())
        digest.update(_times_of(listings[side]).astype("<i8").tobytes())
    return digest.hexdigest()


def _times_of(listing: Listing) -> np.ndarray:
    """Look up when each image was changed: int64 (n,), in nanoseconds."""
    (root,), keys = listing.containers, listing.records["key"].to_pylist()
    if not is_remote(root):
        times = (os.stat(os.path.join(root, key)).st_mtime_ns for key in keys)
        return np.fromiter(times, dtype=np.int64, count=len(keys))
    filesystem, path = StoragePath(root).open()
    selector = pafs.FileSelector(path, recursive=True)
    found = retrying(lambda: filesystem.get_file_info(selector), address=root)
    start = len(path.rstrip("/")) + 1
    by_key = {info.path[start:]: info.mtime_ns or 0 for info in found}
    return np.array([by_key.get(key, 0) for key in keys], dtype=np.int64)
