"""Make shard sets on a path or in a bucket, for tests of both."""

from __future__ import annotations

from pathlib import Path

from pipelines.shards.command import Arguments, make_shards
from pipelines.shards.making import Summary, in_process
from pipelines.storage.path import StoragePath
from tests.s3_server import BUCKET
from tests.small_sets import jpeg

NUM_SHARDS = 3
ROOT = f"s3://{BUCKET}"


def write_images(root: Path) -> Path:
    """Write a folder of 24 images of 3 classes."""
    for number in range(24):
        path = root / f"class{number % 3}" / f"{number:02d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(number))
    return root


def make(source: Path | str, out: str, **options) -> Summary:
    """Convert a source to a set as sovit-shards does, in this process."""
    arguments = Arguments(source, out, num_shards=NUM_SHARDS, **options)
    return make_shards(arguments, execute=in_process)


def content(folder: StoragePath) -> dict[str, bytes]:
    """Read all files of a folder."""
    names = [entry.base_name for entry in folder.entries()]
    return {name: folder.within(name).read() for name in names}


def upload(folder: Path, address: str) -> str:
    """Copy a local set, or another folder of files, to an address."""
    for file in folder.iterdir():
        StoragePath(address).within(file.name).write(file.read_bytes())
    return address
