"""Read images from files, folders and shard sets, and decode them one by one."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pyarrow.fs as pafs
from torch import Tensor

from pipelines.config import Data
from pipelines.data.epoch_plan import plan_epoch
from pipelines.data.reading import Reading, read_rows
from pipelines.data.shard_set import CLASSES_FILE, read_shard_set
from pipelines.shards.suffixes import is_picture_name
from pipelines.storage.path import StoragePath
from pipelines.storage.retry import answering
from pipelines.transforms.decoder import decode_eval
from pipelines.transforms.headers import BadImageError

logger = logging.getLogger(__name__)
_SHARD_SUFFIX = ".parquet"


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """An image's encoded bytes, with the name that the user knows."""

    name: str
    content: bytes
    reason: str = ""
    """Why there are none, if the file could not be read."""


def read_images(addresses: Sequence[str]) -> Iterator[Encoded]:
    """Yield images from files, folders with their subfolders, and shards.

    In a folder, files with a picture's suffix are read, sorted by name, subfolders too,
    and the number of others is logged; a file given by name is read whatever its
    suffix. Raises ValueError where a folder holds no picture, a shard is damaged,
    or a store does not answer.
    """
    for address in addresses:
        with answering():
            yield from _read(StoragePath(address))


def _read(place: StoragePath) -> Iterator[Encoded]:
    if place.kind() != pafs.FileType.Directory:
        yield _file(place)
        return
    names = [entry.base_name for entry in place.entries()]
    pictures = [name for name in names if is_picture_name(name)]
    has_shards = any(name.endswith(_SHARD_SUFFIX) for name in names)
    if has_shards and (CLASSES_FILE in names or not pictures):
        if pictures:
            said = "%s holds shards, which are read, and %d pictures, which are not"
            logger.warning(said, place, len(pictures))
        yield from _of_shards(place.address)
        return
    others: Counter[str] = Counter()
    found = False
    for file in _below(place, others=others, above=()):
        found = True
        yield _file(file)
    passed = ", ".join(f"{num} {suffix}" for suffix, num in others.most_common(5))
    if not found:
        raise ValueError(
            f"expected images in {str(place)!r}, got a folder "
            f"without{f' (of other files it has {passed})' if passed else ''}; name "
            "files, a folder of them, or shards"
        )
    if passed:
        logger.info("%s: files that are no pictures by their names: %s", place, passed)


def _file(place: StoragePath) -> Encoded:
    try:
        return Encoded(name=str(place), content=place.read())
    except ConnectionError:  # the store is down, all further files would fail too
        raise
    except FileNotFoundError:
        return Encoded(name=str(place), content=b"", reason="there is no such file")
    except OSError as error:
        return Encoded(name=str(place), content=b"", reason=f"not readable: {error}")


def _below(
    place: StoragePath, *, others: Counter[str], above: tuple[str, ...]
) -> Iterator[StoragePath]:
    """Walk a folder in the order of names, without hidden entries.

    Args:
        others: Counts the files that are no pictures, by suffix.
        above: Real paths of the folders that this one is in.
    """
    real = "" if place.is_remote else os.path.realpath(place.open()[1])
    if real and real in above:  # a link back up: its pictures are read already
        logger.info("%s is a link to a folder above it: not followed", place)
        return
    for entry in place.entries():
        name = entry.base_name
        if name.startswith("."):
            continue
        if entry.type == pafs.FileType.Directory:
            yield from _below(place.within(name), others=others, above=(*above, real))
        elif is_picture_name(name):
            yield place.within(name)
        else:
            _, dot, suffix = name.rpartition(".")
            others[dot + suffix.lower() if dot else "without a suffix"] += 1


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
    (pixels,) = decode_eval([image.content], data=data, img_size=img_size)
    return pixels
