"""Classify names of files and folders: litter, images, other files, splits."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from pipelines.shards.stored import suffix

# A file of another suffix, or of none, may be an image: it is tried, and named if not.
OTHER_SUFFIXES = frozenset(
    {"txt", "csv", "tsv", "json", "jsonl", "xml", "yaml", "yml", "md", "rst", "html"}
    | {"htm", "pdf", "py", "ipynb", "mat", "npy", "npz", "pkl", "pickle", "h5", "hdf5"}
    | {"db", "sqlite", "ini", "cfg", "log", "lst", "list", "idx", "url", "lnk", "doc"}
    | {"docx", "xls", "xlsx", "cls", "bak", "tmp", "partial", "crdownload", "part"}
)
COMPRESSED_TARS = (
    ".tgz",
    ".tar.gz",
    ".tar.bz2",
    ".tbz2",
    ".tar.xz",
    ".txz",
    ".tar.zst",
)
_LITTER = frozenset(
    {"__macosx", "@eadir", "thumbs.db", "ehthumbs.db", "desktop.ini", "lost+found"}
    | {"$recycle.bin", "system volume information", "#recycle", "#snapshot", "icon\r"}
    | {"__pycache__"}
)
HIDDEN = "hidden files, or a system's own"
# Folders that hold images without naming a class.
IMAGE_FOLDERS = frozenset({"images", "image", "imgs", "img", "jpegimages"})
PLAIN_FOLDERS = IMAGE_FOLDERS | {"pics", "pictures", "photos", "jpg", "jpeg", "png"}
PLAIN_FOLDERS |= {"data", "dataset", "raw", "all"}
_SPLITS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
_MORE_SPLITS = _SPLITS | {
    "dev": "val",
    "eval": "val",
    "evaluation": "val",
    "holdout": "test",
    "trainval": "train",
}
_FILLING = frozenset({"set", "sets", "data", "images", "image", "img", "imgs", "split"})
_PART = re.compile(r"(.*?)[-_](\d+)[-_]of[-_](\d+)(?!\d)")


def is_litter(name: str) -> bool:
    """Check whether a file or folder is a system's own and never a part of a set."""
    return name.startswith(".") or name.casefold() in _LITTER


def has_litter(path: str) -> bool:
    """Check whether a path leads through litter."""
    return any(map(is_litter, path.split("/")))


def is_other(name: str) -> bool:
    """Check whether a file's suffix is that of something else than an image."""
    return suffix(name) in OTHER_SUFFIXES


def other_files(name: str) -> str:
    """Return the reason under which a file of another suffix is counted."""
    return f"other files (.{suffix(name)})"


def _words(name: str) -> list[str]:
    words = re.findall(r"[a-z]+", name.casefold())
    return [re.sub(r"(?<=.)(set|data)$", "", word) for word in words]


def is_split(name: str) -> bool:
    """Check whether a folder is named as a split: Train, val_images, test2017."""
    words = [word for word in _words(name) if word not in _FILLING]
    return bool(words) and all(word in _MORE_SPLITS for word in words)


def split_of(path: str) -> str | None:
    """Find the split that a file's path names, such as `x-val-003.tar`."""
    for part in path.split("/"):
        for word in _words(part):
            if word in _SPLITS:
                return _SPLITS[word]
    return None


def refuse_mixed_parts(paths: Sequence[str], *, root: str, may_lack: bool) -> None:
    """Raise ValueError where files of two sets would become one.

    Args:
        paths: The files, below `root`.
        root: Where they lie, for the error.
        may_lack: The user named these very files, so that others may be missing.
    """
    splits = {path: split_of(path) for path in paths}
    matches = {path: _PART.match(path) for path in paths}
    named = {path: match[1] for path, match in matches.items() if match}
    groups = named if len(named) == len(paths) else splits
    distinct = sorted({str(group) for group in groups.values() if group})
    if len(distinct) > 1 or len(set(splits.values()) - {None}) > 1:
        distinct = distinct if len(distinct) > 1 else sorted(set(map(str, splits)))
        first = next(path for path in paths if groups[path])
        raise ValueError(
            f"{root} holds the splits {', '.join(distinct)}: name one of them, for "
            f"example '{root}/{_pattern(first)}'."
        )
    totals: dict[tuple[str, int], set[int]] = {}
    for match in filter(None, matches.values()):
        totals.setdefault((match[1], int(match[3])), set()).add(int(match[2]))
    if len(totals) > 1:
        raise ValueError(
            f"{root} holds parts of sets of {' and '.join(f'{n:,}' for _, n in totals)}"
            f" files, such as {paths[0]} and {paths[-1]}: name those of one."
        )
    for (name, total), parts in totals.items():
        if len(parts) < total and not may_lack:
            missing = min(set(range(total + 1)) - parts)
            raise ValueError(
                f"{root} holds {len(parts)} of the {total} files of {name!r}, the "
                f"first missing is number {missing}: fetch them, or name those that "
                f"are there, '{root}/{_pattern(paths[0])}', to take them alone."
            )


def _pattern(path: str) -> str:
    match = _PART.match(path)
    if match:
        return f"{match[1]}-*.{path.rpartition('.')[2]}"
    folder, _, name = path.rpartition("/")
    return f"{folder}/*.{suffix(name)}" if folder else re.sub(r"\d+", "*", name)


def are_numbered(names: Iterable[str]) -> bool:
    """Check whether names differ in a number alone, as parts of one set do.

    WordNet ids (n01440764) are names.
    """
    found = list(names)
    patterns = {re.sub(r"\d+", "#", name) for name in found}
    are_ids = all(re.fullmatch(r"n\d+", name) for name in found)
    return len(patterns) == 1 and not are_ids and "#" in next(iter(patterns))
