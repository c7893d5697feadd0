"""List files in folders, on a disk, in a bucket, in a zip or in tars, by class."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field

from pipelines.shards.classes import plain
from pipelines.shards.listing import Builder, printable
from pipelines.shards.names import (
    HIDDEN,
    IMAGE_FOLDERS,
    PLAIN_FOLDERS,
    has_litter,
    is_litter,
    is_other,
    is_split,
    other_files,
)
from pipelines.shards.stored import child, list_remote, suffix
from pipelines.storage.retry import is_remote

NO_CLASS = "not within a class's folder"
_CONTAINERS = frozenset({"parquet", "tar", "zip"})


@dataclass
class Tree:
    """Images of a source by their paths, and what else lies there.

    Attributes:
        root: The source, for errors.
        builder: The images, not labelled yet; what was left out.
        folders: Top folders, also those without images.
        stored: Tars, zips and Parquet files.
        other_folders: Top folders that hold other files, and how many.
    """

    root: str
    builder: Builder
    folders: list[str] = field(default_factory=list)
    stored: list[str] = field(default_factory=list)
    other_folders: Counter[str] = field(default_factory=Counter)

    def add(self, key: str, *, size_bytes: int, offset: int = 0) -> None:
        """Add a file: as an image, a container, or something else to be counted."""
        kind = suffix(key)
        if has_litter(key):
            self.builder.ignored[HIDDEN] += 1
        elif is_other(key):
            self.builder.ignored[other_files(key)] += 1
            if "/" in key:
                self.other_folders[key.partition("/")[0]] += 1
        elif kind in _CONTAINERS or kind in ("gz", "tgz", "bz2", "xz", "zst", "tbz2"):
            self.stored.append(key)
        else:
            self.builder.add(key, size_bytes=size_bytes, offset=offset)

    def keep_below(self, folder: str) -> None:
        """Keep only the files below a folder.

        Raises ValueError where there are none.
        """
        start = f"{folder.strip('/')}/"
        num = self.builder.keep(lambda key: key.startswith(start), cut=len(start))
        if not num:
            names = ", ".join(self.folders[:5]) or "none"
            raise ValueError(
                f"expected images below --subfolder {folder} in {self.root}, got none "
                f"there; its folders are {names}"
            )
        self.other_folders.clear()
        self.find_folders()

    def find_folders(self) -> None:
        """Find the top folders by the files in them, where there are no others."""
        keys = self.builder.keys
        tops = {key.partition("/")[0] for key in keys if "/" in key}
        self.folders = sorted(tops | set(self.other_folders))


def walk(root: str) -> Tree:
    """List all files below a folder. Links are followed, but for those that lead back.

    Raises:
        ValueError: A folder can't be read.
    """
    tree = Tree(root, Builder("folder", containers=[root]))
    if is_remote(root):
        for key, size_bytes in list_remote(root):
            tree.add(key, size_bytes=size_bytes)
        tree.find_folders()
        return tree
    for key, entry in _walk(tree):
        tree.add(key, size_bytes=entry.stat().st_size)
    return tree


_Id = tuple[int, int]


def _walk(tree: Tree) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Yield plain files: a folder's own, by name, then those of its folders."""
    top = os.stat(tree.root)
    todo: list[tuple[str, tuple[_Id, ...]]] = [("", ((top.st_dev, top.st_ino),))]
    seen: set[_Id] = set()  # within the top folder that is being walked
    while todo:
        place, above = todo.pop()
        if "/" not in place:
            seen = set()
        folders = []
        for entry in _entries(os.path.join(tree.root, place)):
            key = f"{place}/{entry.name}" if place else entry.name
            if _is(entry.is_dir):
                folders.append((key, entry))
            elif _is(entry.is_file):
                yield key, entry
            elif not is_litter(entry.name):  # a link to nothing, a pipe
                tree.builder.skip(key, source=entry.path, reason="not a plain file")
        below = [
            (key, (*above, found))
            for key, entry in folders
            if (found := _enter(tree, key, entry=entry, above=above, seen=seen))
        ]
        if not place:
            _note_links(tree, tops=below)
        todo.extend(reversed(below))


def _enter(
    tree: Tree,
    key: str,
    *,
    entry: os.DirEntry[str],
    above: tuple[_Id, ...],
    seen: set[_Id],
) -> _Id | None:
    """Identify a folder to walk, or count why it is skipped."""
    if is_litter(entry.name):
        tree.builder.ignored[HIDDEN] += 1
        return None
    if printable(entry.name) != entry.name:
        reason = "the folder's name is not UTF-8"
        tree.builder.skip(key, source=entry.path, reason=reason)
        return None
    status = entry.stat()
    found = status.st_dev, status.st_ino
    if found in above:
        tree.builder.ignored["links to a folder above"] += 1
        return None
    if "/" not in key:
        tree.folders.append(key)
    elif found in seen:
        reason = "a link to a folder that is listed already"
        tree.builder.skip(key, source=entry.path, reason=reason)
        return None
    else:
        seen.add(found)
    return found


def _note_links(tree: Tree, *, tops: Sequence[tuple[str, tuple[_Id, ...]]]) -> None:
    names: dict[_Id, str] = {}
    for name, ids in tops:
        other = names.setdefault(ids[-1], name)
        if other != name:
            tree.builder.notes.append(f"{other} and {name} are the same folder")


def _entries(folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise ValueError(
            f"expected to read the folder {folder}, got {error.strerror!r}; make it "
            "readable, or move it out of the source"
        ) from None


def _is(question: Callable[[], bool]) -> bool:
    try:
        return question()
    except OSError:  # a link to itself
        return False


def label_by_folder(tree: Tree, *, depth: int | None) -> None:
    """Label each image by the name of a folder that it lies in.

    Args:
        tree: The images.
        depth: Which folder on the way names the class: 1 is the first, which is taken
            where it is not given and nothing speaks against it.

    Raises:
        ValueError: There are no such folders, or they could be something else.
    """
    builder = tree.builder
    if depth is None:
        _refuse_unclear(tree)
    level = depth or 1
    names: dict[str, str] = {}  # by folder

    def name_of(key: str) -> str | None:
        parts = key.split("/", level)
        if len(parts) <= level:
            return None
        folder = key[: -len(parts[-1]) - 1]
        name = names.get(folder)
        if name is None:
            name = names[folder] = plain(parts[-2])
        return name

    builder.relabel(name_of, reason=NO_CLASS)
    homes: dict[str, str] = {}
    for folder, name in names.items():
        if homes.setdefault(name, folder) != folder:
            raise ValueError(
                f"expected one folder for each class in {tree.root}, got "
                f"{homes[name]!r} and {folder!r} for {name!r}; rename one, or make "
                "sets of their parents"
            )
    _note_case(builder, names=homes)


def empty_folders(tree: Tree) -> list[str]:
    """List class folders that hold no image, and nothing else either."""
    names = set(tree.builder.names())
    return [
        plain(folder)
        for folder in tree.folders
        if plain(folder) not in names and not tree.other_folders[folder]
    ]


def _note_case(builder: Builder, *, names: Collection[str]) -> None:
    folded = Counter(name.casefold() for name in names)
    alike = [name for name in names if folded[name.casefold()] > 1]
    if alike:
        builder.notes.append(
            f"classes that differ in capitals alone: {', '.join(sorted(alike))}"
        )
    are_numbers = all(name.isdecimal() for name in names)
    if are_numbers and sorted(names) != sorted(names, key=int):
        first = ", ".join(sorted(names)[:3])
        builder.notes.append(
            f"class folders are numbers and ordered as texts ({first}, ...), as "
            "torchvision does; --classes FILE orders them otherwise"
        )


def _refuse_unclear(tree: Tree) -> None:
    inner = _folders_within(tree.builder.keys)
    tops = [name for name in tree.folders if name in inner or _is_empty(tree, name)]
    splits = [name for name in tops if is_split(name)]
    holding = [name for name in splits if "" not in inner.get(name, {""})]
    if splits and (len(splits) > 1 or len(splits) == len(tops) or holding):
        raise ValueError(
            f"{tree.root} holds the splits {', '.join(splits)}, not classes: take one, "
            f"{_choice(tree, splits[-1])}, or say --class-depth 1 if they are classes."
        )
    if not inner:
        _refuse_flat(tree)
    if len(inner) == 1 and len(tops) <= 1:
        _refuse_wrapped(tree, inner=inner)
    parted = [top for top, names in inner.items() if sum(map(is_split, names)) > 1]
    if parted:
        names = ", ".join(sorted(inner[parted[0]]))
        raise ValueError(
            f"{tree.root}/{parted[0]} holds the splits {names}: make a folder of each "
            "split with the classes in it, or say --class-depth 1 to take all of them."
        )
    plain_tops = [top for top in inner if top.casefold() in IMAGE_FOLDERS]
    if plain_tops and len(tops) > 1:
        others = ", ".join(top for top in tops if top not in plain_tops)
        raise ValueError(
            f"{tree.root} holds {plain_tops[0]} beside {others}: take its images alone "
            f"by {_choice(tree, plain_tops[0])}, or say --class-depth 1 to make each "
            "of these folders a class."
        )
    _note_folders(tree, inner=inner)


def _choice(tree: Tree, folder: str) -> str:
    """Describe how a folder of the source is chosen."""
    if tree.builder.kind == "folder":
        return child(tree.root, folder)
    return f"--subfolder {folder}"


def _is_empty(tree: Tree, folder: str) -> bool:
    return not tree.other_folders[folder]


def _note_folders(tree: Tree, *, inner: dict[str, set[str]]) -> None:
    nested = {top: sorted(n) for top, n in inner.items() if len(n) > 1 and "" not in n}
    if nested:
        top, names = next(iter(nested.items()))
        tree.builder.notes.append(
            f"folders within class folders make no classes ({top} holds "
            f"{', '.join(names[:3])}{', ...' * (len(names) > 3)}): --class-depth 2 "
            "takes those for classes"
        )
    for folder in tree.folders:
        if folder not in inner and not _is_empty(tree, folder):
            tree.builder.notes.append(f"{folder} holds no image and makes no class")


def _folders_within(keys: Sequence[str]) -> dict[str, set[str]]:
    """Find each top folder's folders with images; "" stands for itself."""
    found: dict[str, set[str]] = {}
    for key in keys:
        top, slash, rest = key.partition("/")
        if slash:
            inner, slash, _ = rest.partition("/")
            found.setdefault(top, set()).add(inner if slash else "")
    return found


def _refuse_flat(tree: Tree) -> None:
    num = len(tree.builder.keys)
    if num:
        raise ValueError(
            f"expected a folder a class in {tree.root}, got none but {num:,} images "
            f"(such as {tree.builder.keys[0]!r}); give their labels by --labels FILE, "
            "lines NAME,LABEL"
        )
    raise ValueError(
        f"expected a folder a class in {tree.root}, got "
        f"none{tree.builder.reasons() or '; it is empty'}"
    )


def _refuse_wrapped(tree: Tree, *, inner: dict[str, set[str]]) -> None:
    (top, names), path = next(iter(inner.items())), ""
    while "" not in names and len(names) == 1:
        path = f"{path}/{next(iter(names))}"
        start = f"{top}{path}/"
        below = [key[len(start) :] for key in tree.builder.keys if "/" in key]
        names = {key.partition("/")[0] if "/" in key else "" for key in below}
    if "" not in names:
        raise ValueError(
            f"All images of {tree.root} are in its one folder {top}{path}, which "
            f"holds {', '.join(sorted(names)[:4])}: take what is in it, "
            f"{_choice(tree, top + path)}, or say --class-depth 1 to make {top} the "
            "one class."
        )
    if top.casefold() in PLAIN_FOLDERS:
        raise ValueError(
            f"All images of {tree.root} are in its one folder {top}, which names no "
            "class: give their labels by --labels FILE, lines NAME,LABEL, or say "
            "--class-depth 1 to make it the one class."
        )
