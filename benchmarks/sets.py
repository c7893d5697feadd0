"""Write one set of photographs in each loader's format, with the same bytes."""

from __future__ import annotations

import importlib
import importlib.util
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from benchmarks.photographs import cut_photographs
from pipelines.shards.command import Arguments, make_shards
from pipelines.shards.making import in_process

_SEED = 0
# As few as give every thread of a machine one, as many as sovit-shards writes at least.
_NUM_TARS = 8


def make_set(folder: Path, *, num_images: int, short_side: int | None) -> Path:
    """Write what is missing of a set of photographs below `folder`; return its folder.

    Args:
        short_side: Shrinks the images; the originals by default.
    """
    out = original = folder / f"photographs-{num_images}"
    _once(original / "images", lambda out: _cut_images(out, num_images=num_images))
    if short_side is not None:
        out = folder / f"{original.name}-{short_side}"
    write_shards(out, images=original / "images", short_side=short_side)
    _once(out / "images", lambda images: unpack_shards(out / "shards", images))
    if importlib.util.find_spec("streaming"):
        _once(out / "mds", lambda mds: write_mds(out / "images", mds))
    if importlib.util.find_spec("webdataset"):
        _once(out / "tars", lambda tars: write_tars(out / "images", tars))
    return out


def _cut_images(out: Path, *, num_images: int) -> None:
    for path in cut_photographs(out, num_images=num_images, seed=_SEED):
        scene = out / path.stem.rpartition("-")[0]
        scene.mkdir(exist_ok=True)
        path.rename(scene / path.name)


def write_shards(folder: Path, *, images: Path, short_side: int | None = None) -> None:
    """Write a folder of classes as the Parquet shards that training reads."""
    out = folder / "shards"
    arguments = Arguments(images, out, seed=_SEED, short_side=short_side)
    make_shards(arguments, execute=in_process)


def unpack_shards(shards: Path, out: Path) -> None:
    """Write the images of shards back as files, in a folder for each class."""
    for path in sorted(shards.glob("*.parquet")):
        rows = pq.read_table(path, columns=["image", "key"])
        for image, key in zip(rows["image"], rows["key"], strict=True):
            place = out / key.as_py()
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(image.as_py())


def labelled_images(images: Path) -> Iterator[tuple[Path, int]]:
    """Yield the files of a folder of classes with their labels, the classes in turn."""
    classes = sorted(path for path in images.iterdir() if path.is_dir())
    of_classes = [sorted(path.iterdir()) for path in classes]
    for at in range(max(map(len, of_classes))):
        for label, paths in enumerate(of_classes):
            if at < len(paths):
                yield paths[at], label


def write_mds(images: Path, out: Path) -> None:
    """Write MosaicML Streaming's format, the files' bytes as they are."""
    streaming: Any = importlib.import_module("streaming")
    columns = {"image": "bytes", "label": "int"}
    with streaming.MDSWriter(out=str(out), columns=columns) as writer:
        for path, label in labelled_images(images):
            writer.write({"image": path.read_bytes(), "label": label})


def write_tars(images: Path, out: Path) -> None:
    """Write WebDataset's tars, the files' bytes as they are."""
    webdataset: Any = importlib.import_module("webdataset")
    out.mkdir(parents=True)
    samples = list(labelled_images(images))
    for number in range(_NUM_TARS):
        with webdataset.TarWriter(str(out / f"{number:05d}.tar")) as writer:
            for path, label in samples[number::_NUM_TARS]:
                sample = {"jpg": path.read_bytes(), "cls": label}
                writer.write({"__key__": path.stem, **sample})


def _once(out: Path, write: Callable[[Path], None]) -> None:
    """Write a folder if it is missing; an interrupted one is written anew."""
    if out.exists():
        return
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.parent.mkdir(parents=True, exist_ok=True)
    write(partial)
    partial.rename(out)
