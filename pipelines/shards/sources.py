"""Detect what a source is, once, and list its images.

The result is a `Listing`: its layout, classes and images, and what was left out.
Where a source could be two things it is rejected, with the option that decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import pyarrow.fs as pafs

from pipelines.shards.classes import Numbering, read_classes, resolve_names
from pipelines.shards.hf_parquet import list_parquet
from pipelines.shards.labels import LabelFile, label_by_file
from pipelines.shards.listing import USUAL_FIELDS, Fields, Listing
from pipelines.shards.names import (
    COMPRESSED_TARS,
    PLAIN_FOLDERS,
    are_numbered,
    other_files,
    refuse_mixed_parts,
    split_of,
)
from pipelines.shards.stored import base_name, child, find, stem, suffix
from pipelines.shards.tars import (
    Sketch,
    list_class_tars,
    list_tar_tree,
    sketch_tar,
)
from pipelines.shards.tree import Tree, empty_folders, label_by_folder, walk
from pipelines.shards.webdataset import list_webdataset
from pipelines.shards.zips import list_zip
from pipelines.storage.path import StoragePath

Kind = Literal["folder", "ilsvrc-train", "ilsvrc-val", "webdataset", "parquet"]
_CONTENTS = {
    "nested": "tars within",
    "images": "images alone",
    "webdataset": "images and labels",
}
_STORED = {"parquet": "Parquet files", "tar": "tars", "zip": "zips"}


@dataclass(frozen=True)
class Wishes:
    """Options by which the user describes a source.

    Attributes:
        kind: What the source is; None finds out.
        numbering: Of classes.
        labels: Text of labels, for images that come without.
        fields: Parts of a WebDataset's samples, or columns.
        class_depth: Which folder on the way to an image names its class, from 1.
        subfolder: Folder within a zip, tar or folder that is the source.
    """

    kind: Kind | None
    numbering: Numbering
    labels: LabelFile | None
    fields: Fields
    class_depth: int | None
    subfolder: str | None


def list_source(
    source: str | Path,
    *,
    kind: Kind | None = None,
    labels: str | Path | None = None,
    synsets: str | Path | None = None,
    classes_file: str | Path | None = None,
    classes: Sequence[str] | None = None,
    subset: bool = False,
    count_from: int | None = None,
    fields: Fields = USUAL_FIELDS,
    class_depth: int | None = None,
    subfolder: str | None = None,
) -> Listing:
    """List the images of a source.

    Args:
        source: A folder, a file, or a pattern such as `data/train-*.parquet`, on a
            path or in a bucket.
        kind: What the source is; None finds out.
        labels: Labels of images that come without, see `labels.label_by_file`.
        synsets: What maps the devkit's ids to class names, beside `labels`.
        classes_file: Class names in the order of their labels, see `read_classes`.
        classes: The same names, where they were read already.
        subset: Leave out images of classes that are not among those.
        count_from: Number of the first class where labels are numbers.
        fields: The image's and the label's part of a sample, or column.
        class_depth: Which folder on the way to an image names its class, from 1.
        subfolder: Folder within the source that is meant.

    Raises:
        ValueError: The source is missing, empty, damaged or unclear.
    """
    if subset and classes_file is None:
        raise ValueError("--subset needs --classes FILE: the classes that are kept.")
    if synsets is not None and labels is None:
        raise ValueError(
            "--labels and --synsets are for ilsvrc-val, where --synsets says what the "
            "ids in --labels are: leave it out, the source names its classes itself."
        )
    if classes_file is not None:
        classes = read_classes(classes_file)
    asked = None if synsets is None else str(synsets)
    column = fields.label if labels is not None else None
    wishes = Wishes(
        kind=kind,
        numbering=Numbering(classes, subset=subset, count_from=count_from),
        labels=None if labels is None else LabelFile(str(labels), asked, column),
        fields=fields,
        class_depth=class_depth,
        subfolder=subfolder,
    )
    addresses, is_folder = find(str(source))
    if is_folder:
        return _list_folder(addresses[0], wishes=wishes)
    return _list_files(addresses, root=str(source), wishes=wishes, is_named=True)


def _list_folder(root: str, *, wishes: Wishes) -> Listing:
    if wishes.subfolder and _is_folder(child(root, wishes.subfolder)):
        root = child(root, wishes.subfolder)
        wishes = replace(wishes, subfolder=None)
    tree = walk(root)
    files = sorted(tree.stored, key=lambda key: key.split("/"))
    if any("/" in key for key in tree.builder.keys):
        packed = [key for key in files if suffix(key) not in _STORED]
        for key in packed:  # what the folders were unpacked from, most likely
            tree.builder.ignored[other_files(key)] += 1
        files = [key for key in files if key not in packed]
    takes_images = wishes.kind in (None, "ilsvrc-val") and not files
    if wishes.kind == "ilsvrc-val" and tree.builder.keys:
        takes_images = True
    if wishes.kind == "folder" or takes_images:
        for key in files:
            tree.builder.ignored[other_files(key)] += 1
        return _list_tree(_within(tree, subfolder=wishes.subfolder), wishes=wishes)
    if wishes.kind is None:
        _refuse_two_sources(tree, files=files)
    else:
        wanted = "parquet" if wishes.kind == "parquet" else "tar"
        files = [key for key in files if suffix(key) == wanted]
        if not files:
            raise ValueError(f"expected *.{wanted} files in {root}, got none")
    addresses = [child(root, key) for key in files]
    listing = _list_files(addresses, root=root, wishes=wishes, is_named=False)
    for reason, num in tree.builder.ignored.items():
        listing.ignored[reason] = listing.ignored.get(reason, 0) + num
    if tree.builder.keys:
        listing.ignored["files beside those"] = len(tree.builder.keys)
    return listing


def _is_folder(address: str) -> bool:
    return StoragePath(address).kind() == pafs.FileType.Directory


def _refuse_two_sources(tree: Tree, *, files: Sequence[str]) -> None:
    kinds = sorted({suffix(key) for key in files})
    inside = [key for key in tree.builder.keys if "/" in key]
    names = [_STORED.get(kind, f".{kind}") for kind in kinds]
    if inside:
        way = f"name {tree.root}/{files[0]}"
        if kinds[0] != "zip":
            way = "--kind parquet" if kinds[0] == "parquet" else "--kind webdataset"
        raise ValueError(
            f"{tree.root} holds folders with {len(inside):,} images (such as "
            f"{inside[0]!r}) and {' and '.join(names)} ({files[0]!r}): say --kind "
            f"folder to take the folders, or {way} to take the files."
        )
    packed = [key for key in files if suffix(key) not in _STORED]
    if packed:
        raise ValueError(
            f"{tree.root} holds {packed[0]!r}, which is compressed: unpack it to a "
            "plain tar first."
        )
    if len(kinds) > 1:
        raise ValueError(
            f"{tree.root} holds {' and '.join(names)}: name one of them, for example "
            f"'{tree.root}/*.{kinds[0]}'."
        )


def _list_files(
    addresses: Sequence[str], *, root: str, wishes: Wishes, is_named: bool
) -> Listing:
    """List tars, zips or Parquet files, which are all of one kind."""
    kinds = {suffix(base_name(address)) for address in addresses}
    kind = kinds.pop() if len(kinds) == 1 else ""
    if any(base_name(a).lower().endswith(COMPRESSED_TARS) for a in addresses):
        raise ValueError(f"{addresses[0]} is compressed: unpack it to a plain tar.")
    if wishes.kind == "parquet" or (wishes.kind is None and kind == "parquet"):
        _check_parts(addresses, root=root, is_named=is_named)
        _refuse_labels(wishes, found="Parquet files")
        return list_parquet(addresses, numbering=wishes.numbering, fields=wishes.fields)
    if kind == "zip" and wishes.kind in (None, "folder", "ilsvrc-val"):
        if len(addresses) > 1:
            raise ValueError(
                f"expected one zip, got {len(addresses)}, such as {addresses[1]}; name "
                "one, or unpack them to one folder"
            )
        tree = _within(list_zip(addresses[0]), subfolder=wishes.subfolder)
        return _list_tree(tree, wishes=wishes)
    if kind != "tar" and wishes.kind is None:
        raise ValueError(
            f"Cannot tell what {root} is: name its --kind (folder, ilsvrc-train, "
            "ilsvrc-val, webdataset or parquet)."
        )
    return _list_tars(addresses, root=root, wishes=wishes, is_named=is_named)


def _refuse_labels(wishes: Wishes, *, found: str) -> None:
    if wishes.labels is not None:
        raise ValueError(
            f"--labels and --synsets are for ilsvrc-val, not for {found}, which have "
            "labels: leave them out."
        )


def _check_parts(addresses: Sequence[str], *, root: str, is_named: bool) -> None:
    start = "" if is_named else f"{root.partition('?')[0].rstrip('/')}/"
    paths = [
        base_name(address) if is_named else address.removeprefix(start)
        for address in addresses
    ]
    root = root.rpartition("/")[0] if is_named else root
    refuse_mixed_parts(paths, root=root, may_lack=is_named)


def _list_tars(
    addresses: Sequence[str], *, root: str, wishes: Wishes, is_named: bool
) -> Listing:
    kind = wishes.kind or _tars_kind(addresses, root=root, wishes=wishes)
    if kind == "webdataset":
        _check_parts(addresses, root=root, is_named=is_named)
        _refuse_labels(wishes, found="WebDataset tars")
        return list_webdataset(
            addresses, numbering=wishes.numbering, fields=wishes.fields
        )
    if kind == "ilsvrc-train":
        _refuse_labels(wishes, found="ilsvrc-train")
        listing = list_class_tars(addresses, numbering=wishes.numbering)
        if wishes.kind is None and other_files("x.cls") in listing.ignored:
            raise ValueError(
                f"expected images of one class in each tar of {root}, got labels "
                "(.cls) too; say --kind webdataset or --kind ilsvrc-train"
            )
        return listing
    if kind == "folder":
        tree = list_tar_tree(addresses, root=root)
        return _list_tree(_within(tree, subfolder=wishes.subfolder), wishes=wishes)
    if len(addresses) > 1:
        raise ValueError(f"expected one tar of validation images, got {len(addresses)}")
    if wishes.labels is None:
        raise ValueError(
            f"{addresses[0]} holds images without classes: give their labels by "
            "--labels FILE, or say --kind ilsvrc-train if the tar is one class."
        )
    tree = _within(list_tar_tree(addresses, root=root), subfolder=wishes.subfolder)
    return label_by_file(tree.builder, wishes.labels, numbering=wishes.numbering)


def _tars_kind(addresses: Sequence[str], *, root: str, wishes: Wishes) -> Kind:
    sketches = [
        sketch_tar(address, whole=place == 0) for place, address in enumerate(addresses)
    ]
    first: dict[str, str] = {}
    for address, sketch in zip(addresses, sketches, strict=True):
        first.setdefault(sketch.kind, address)
    if "webdataset" in first and "images" in first and "nested" not in first:
        return "webdataset"  # labels may come later; where they don't, it is said
    if len(first) > 1:
        raise ValueError(
            f"{root} holds "
            + " and ".join(
                f"{base_name(address)} ({_CONTENTS[kind]})"
                for kind, address in first.items()
            )
            + ": name one of them as SOURCE."
        )
    if "nested" in first:
        return "ilsvrc-train"
    if "webdataset" in first:
        return "webdataset"
    if wishes.labels is not None:
        return "ilsvrc-val"
    if wishes.class_depth or wishes.subfolder or any(map(_has_folders, sketches)):
        return "folder"
    if len(addresses) == 1:
        return "ilsvrc-val"
    _refuse_no_class_tars(addresses, root=root, classes=wishes.numbering.classes)
    return "ilsvrc-train"


def _has_folders(sketch: Sketch) -> bool:
    return len(sketch.folders - {""}) > 1


def _refuse_no_class_tars(
    addresses: Sequence[str], *, root: str, classes: Sequence[str] | None
) -> None:
    names = [stem(address) for address in addresses]
    if classes is not None and set(names) <= set(classes):
        return
    splits = [name for name in names if split_of(name)]
    if splits or are_numbered(names):
        odd = splits[0] if splits else names[0]
        raise ValueError(
            f"The tars of {root} hold images without labels, and {odd}.tar is not "
            "named as a class is: name the right tars, or say --kind ilsvrc-train to "
            "make a class of each, or --kind webdataset with --label-field."
        )


def _within(tree: Tree, *, subfolder: str | None) -> Tree:
    if subfolder:
        tree.keep_below(subfolder)
    return tree


def _list_tree(tree: Tree, *, wishes: Wishes) -> Listing:
    builder = tree.builder
    is_val = wishes.kind == "ilsvrc-val" or (
        wishes.labels is not None and wishes.kind is None and _is_flat(tree)
    )
    if is_val:
        if wishes.labels is None:
            raise ValueError(
                f"{tree.root} holds images without classes: give their labels by "
                "--labels FILE."
            )
        if not builder.keys:
            return builder.finish([], labels={})
        builder.sort()
        return label_by_file(builder, wishes.labels, numbering=wishes.numbering)
    if wishes.labels is not None:
        raise ValueError(
            f"--labels and --synsets are for ilsvrc-val, and {tree.root} has folders, "
            "which name classes: leave them out, or say --kind ilsvrc-val if --labels "
            "alone has the classes."
        )
    label_by_folder(tree, depth=wishes.class_depth)
    names = builder.names()
    if wishes.class_depth in (None, 1):
        names += empty_folders(tree)
    within = {"folder": "", "zip": " in a zip", "tar": " in tars"}
    builder.layout = f"class folders{within[builder.kind]}"
    with builder.explaining():
        ordered, labels = resolve_names(names, numbering=wishes.numbering)
    return builder.finish(ordered, labels=labels)


def _is_flat(tree: Tree) -> bool:
    tops = {key.partition("/")[0] for key in tree.builder.keys if "/" in key}
    return len(tops) <= 1 and all(top.casefold() in PLAIN_FOLDERS for top in tops)
