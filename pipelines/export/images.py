"""Read images of any number of files, folders and shard sets, and decode each alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pyarrow.fs as pafs
from torch import Tensor

from pipelines.config import Data
from pipelines.files import Place
from pipelines.ingest.footers import read_shard_set
from pipelines.ingest.plan import plan_epoch
from pipelines.ingest.reading import Reading, read_rows
from pipelines.pixels.decode_eval import decode_eval
from pipelines.retries import answering
from pipelines.shards.images import BadImageError, check_image
from pipelines.shards.tars import IMAGE_SUFFIXES

_SHARD_SUFFIX = ".parquet"


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """Hold an image's bytes, under the name that the user knows it by."""

    name: str
    content: bytes
    reason: str = ""
    """Why there are none, where the file could not be read."""


def read_images(addresses: Sequence[str]) -> Iterator[Encoded]:
    """Read images one by one: of files, of folders and those below, of shards.

    Of a folder the files with an image's suffix are taken, by name; a file that is
    named is taken whatever its suffix. Raises ValueError where a folder holds no image,
    a shard is damaged, or a store does not answer.
    """
    for address in addresses:
        with answering():
            yield from _read(Place(address))


def _read(place: Place) -> Iterator[Encoded]:
    if place.kind() != pafs.FileType.Directory:
        yield _file(place)
        return
    names = [entry.base_name for entry in place.entries()]
    if any(name.endswith(_SHARD_SUFFIX) for name in names):
        yield from _of_shards(place.address)
        return
    found = False
    for file in _below(place):
        found = True
        yield _file(file)
    if not found:
        raise ValueError(
            f"wanted images in {str(place)!r}, came a folder without; name files, a "
            "folder of them, or shards"
        )


def _file(place: Place) -> Encoded:
    try:
        return Encoded(name=str(place), content=place.read())
    except ConnectionError:  # the store is down, all further files would fail too
        raise
    except FileNotFoundError:
        return Encoded(name=str(place), content=b"", reason="there is no such file")
    except OSError as error:
        return Encoded(name=str(place), content=b"", reason=f"not readable: {error}")


def _below(place: Place) -> Iterator[Place]:
    """Walk a folder by name; what begins with a dot is left out."""
    for entry in place.entries():
        name = entry.base_name
        if name.startswith("."):
            continue
        if entry.type == pafs.FileType.Directory:
            yield from _below(place.within(name))
        elif name.rpartition(".")[2].lower() in IMAGE_SUFFIXES:
            yield place.within(name)


def _of_shards(address: str) -> Iterator[Encoded]:
    shards = read_shard_set(address)
    reading = Reading(address=address, num_classes=len(shards.classes))
    plan = plan_epoch(shards.groups, batch_size=1, shuffle_rows=64, shuffle=False)
    for unit in plan.units():
        rows = read_rows(unit, reading=reading)
        for key, image in zip(rows["key"], rows["image"], strict=True):
            yield Encoded(name=key.as_py(), content=image.as_py() or b"")


def decode(image: Encoded, *, data: Data, img_size: int) -> Tensor:
    """Decode an image as evaluation does: float32 (3, img_size, img_size).

    Raises BadImageError, which says why, where it can't be.
    """
    if image.reason:
        raise BadImageError(image.reason)
    check_image(image.content, full=False)
    try:
        (pixels,) = decode_eval([image.content], data=data, img_size=img_size)
    except Exception as error:  # Pillow's readers raise anything on broken images
        raise BadImageError(f"does not decode: {error}") from error
    return pixels
