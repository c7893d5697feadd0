"""Finds out what a source is and lists its images."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from pipelines.shards.hf_parquet import list_parquet
from pipelines.shards.listing import Builder, Listing, read_classes, resolve_names
from pipelines.shards.tars import (
    Member,
    list_class_tars,
    list_flat_tar,
    list_webdataset,
    scan_tar,
)

Kind = Literal["folder", "ilsvrc-train", "ilsvrc-val", "webdataset", "parquet"]
SPLIT_NAMES = frozenset({"train", "training", "val", "valid", "validation", "test"})


def list_source(
    source: Path,
    *,
    kind: Kind | None = None,
    labels: Path | None = None,
    synsets: Path | None = None,
    classes_file: str | Path | None = None,
) -> Listing:
    """List the images of a source.

    Args:
        source: A folder, a file, or a pattern such as `data/train-*.parquet`.
        kind: What the source is; None finds out.
        labels: Text of labels, for "ilsvrc-val" only.
        synsets: Text that maps the devkit's ids to class names, beside `labels`.
        classes_file: Class names in the order of their labels, as `read_classes`.

    Raises:
        ValueError: The source is missing, empty, damaged or unclear.
    """
    for path in (labels, synsets):
        if path is not None and not path.exists():
            raise ValueError(f"There is no {path}.")
    paths = _find(source)
    kind = kind or detect_kind(source, paths=paths)
    if kind != "ilsvrc-val" and (labels or synsets):
        raise ValueError(f"--labels and --synsets are for ilsvrc-val, not for {kind}.")
    classes = None if classes_file is None else read_classes(classes_file)
    if kind == "folder":
        return list_folder(source, classes=classes)
    files = _files_of(paths, source=source, suffix=_suffix(kind))
    if kind == "parquet":
        return list_parquet(files, classes=classes)
    if kind == "webdataset":
        return list_webdataset(files, classes=classes)
    if kind == "ilsvrc-train":
        return list_class_tars(files, classes=classes)
    if len(files) > 1:
        raise ValueError(f"Wanted one tar of validation images, got {len(files)}.")
    return list_flat_tar(files[0], labels_file=labels, synsets=synsets, classes=classes)


def _suffix(kind: Kind) -> str:
    return ".parquet" if kind == "parquet" else ".tar"


def _find(source: Path) -> list[Path]:
    if source.exists():
        return [source]
    if any(letter in source.name for letter in "*?["):
        found = sorted(source.parent.glob(source.name))
        if found:
            return found
    raise ValueError(f"There is no {source}: name a folder, a tar or Parquet files.")


def _files_of(paths: Sequence[Path], *, source: Path, suffix: str) -> list[Path]:
    files = [file for path in paths for file in _within(path, suffix=suffix)]
    if not files:
        raise ValueError(f"Wanted *{suffix} files in {source}, found none.")
    return files


def _within(path: Path, *, suffix: str) -> list[Path]:
    return sorted(path.rglob(f"*{suffix}")) if path.is_dir() else [path]


def detect_kind(source: Path, *, paths: Sequence[Path]) -> Kind:
    """Tell what a source is by its files' names and by the first members of a tar.

    Raises:
        ValueError: It looks like none of the kinds.
    """
    if any(_holds(path, ".parquet") for path in paths):
        return "parquet"
    tars = [path for path in paths if _holds(path, ".tar")]
    if tars:
        is_folder = tars[0].is_dir()
        first = sorted(tars[0].glob("*.tar"))[0] if is_folder else tars[0]
        return _detect_tar(first, alone=not is_folder and len(paths) == 1)
    if source.is_dir():
        return "folder"
    raise ValueError(
        f"Cannot tell what {source} is: name its --kind (folder, ilsvrc-train, "
        "ilsvrc-val, webdataset or parquet)."
    )


def _holds(path: Path, suffix: str) -> bool:
    if not path.is_dir():
        return path.name.endswith(suffix)
    nested = path / "data"  # where Hugging Face keeps the files of a data set
    return any(path.glob(f"*{suffix}")) or any(nested.glob(f"*{suffix}"))


def _detect_tar(path: Path, *, alone: bool) -> Kind:
    suffixes = {Path(member.name).suffix for member in _first_members(path)}
    if ".tar" in suffixes:
        return "ilsvrc-train"
    if suffixes & {".cls", ".json"}:
        return "webdataset"
    return "ilsvrc-val" if alone else "ilsvrc-train"


def _first_members(path: Path, *, num: int = 16) -> Iterator[Member]:
    for _, member in zip(range(num), scan_tar(path), strict=False):
        yield member


def list_folder(root: Path, *, classes: Sequence[str] | None) -> Listing:
    """List a tree with a folder a class; files may lie deeper within it.

    The classes are the sorted folder names. Every file counts as an image, so that one
    that is none is reported. Links are followed.

    Raises:
        ValueError: There are no class folders, or they are splits.
    """
    if not root.is_dir():
        raise ValueError(f"Wanted a folder with a folder a class, got {root}.")
    entries = sorted(root.iterdir())
    folders = [entry for entry in entries if entry.is_dir()]
    names = [folder.name for folder in folders]
    if names and SPLIT_NAMES.issuperset(names):
        raise ValueError(
            f"{root} holds the splits {', '.join(names)}, not classes: name one of "
            f"them, for example {folders[0]}."
        )
    builder = Builder("folder", containers=[str(root)])
    for entry in entries:
        if not entry.is_dir():
            builder.skip(entry.name, source=entry, reason="not within a class's folder")
    for folder in folders:
        for path in _walk(folder):
            key = path.relative_to(root).as_posix()
            if path.is_file():
                size_bytes = path.stat().st_size
                builder.add(key, name=folder.name, offset=0, size_bytes=size_bytes)
            else:  # a link to nothing, a pipe
                builder.skip(key, source=path, reason="not a plain file")
    ordered, labels = resolve_names(names, classes=classes)
    return builder.finish(ordered, labels=labels)


def _walk(folder: Path) -> Iterator[Path]:
    seen = set()
    for place, folders, files in os.walk(folder, followlinks=True):
        status = os.stat(place)
        if (status.st_dev, status.st_ino) in seen:  # a link back up
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders.sort()
        yield from (Path(place, file) for file in sorted(files))
