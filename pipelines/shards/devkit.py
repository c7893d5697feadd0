"""Read ImageNet's devkit as it is downloaded: labels of validation images, their ids.

`ILSVRC2012_validation_ground_truth.txt` has a number a line, counted from 1 in an order
of the devkit's own, which is not that of the sorted WordNet ids. `meta.mat`, beside it,
says which WordNet id each number is.
"""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Callable
from dataclasses import dataclass

from pipelines.shards.matfile import read_structs
from pipelines.shards.stored import base_name, child, decode_text, read_stored
from pipelines.storage.path import StoragePath
from pipelines.storage.retry import is_remote

GROUND_TRUTH = "validation_ground_truth"
META_FILE = "meta.mat"
_IN_FOLDER = ("", "data/")
_MAX_BYTES = 64 << 20
_WNID = re.compile(r"n\d{8}")


@dataclass(frozen=True)
class Devkit:
    """Files of a devkit, by name: a folder's, or a tar's."""

    address: str
    read: Callable[[str], bytes | None]
    """Read a file whose path ends with this name; None where there is none."""


def is_devkit(address: str) -> bool:
    """Check whether a file's name is that of a packed devkit."""
    return "devkit" in base_name(address).lower() and ".t" in base_name(address).lower()


def open_devkit(address: str) -> Devkit:
    """Read a packed devkit, `ILSVRC2012_devkit_t12.tar.gz`.

    Raises ValueError where it is no tar, or damaged.
    """
    files: dict[str, bytes] = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(read_stored(address))) as tar:
            for member in tar:
                wanted = member.name.endswith((META_FILE, f"{GROUND_TRUTH}.txt"))
                if wanted and member.isreg() and member.size <= _MAX_BYTES:
                    source = tar.extractfile(member)
                    files[member.name] = source.read() if source else b""
    except (tarfile.TarError, EOFError, OSError) as error:
        raise ValueError(f"{address} is not a whole tar: {error}.") from None

    def read(name: str) -> bytes | None:
        found = [path for path in sorted(files) if path.endswith(name)]
        return files[found[0]] if found else None

    return Devkit(address, read)


def read_ground_truth(devkit: Devkit) -> str:
    """Read a devkit's ground truth, the text of labels."""
    data = devkit.read(f"{GROUND_TRUTH}.txt")
    if data is None:
        raise ValueError(f"expected *{GROUND_TRUTH}.txt in {devkit.address}, got none")
    return decode_text(data, name=devkit.address)


def read_ids(address: str) -> dict[str, str]:
    """Read the class name that each of the devkit's ids stands for.

    Args:
        address: The devkit, packed or not; its meta.mat; or a text of lines `ID
            WORDNET_ID`, or `WORDNET_ID ID ...` as in map_clsloc.txt.

    Raises:
        ValueError: It is none of these.
    """
    if is_devkit(address) and not _is_folder(address):
        data = open_devkit(address).read(META_FILE)
        if data is None:
            raise ValueError(f"expected {META_FILE} in {address}, got none")
        return _of_meta(data, name=address)
    if _is_folder(address):
        address = _find(address, META_FILE) or child(address, META_FILE)
    if address.lower().endswith(".mat"):
        return _of_meta(read_stored(address), name=address)
    return _of_lines(decode_text(read_stored(address), name=address), name=address)


def ids_beside(address: str) -> str | None:
    """Find the meta.mat that lies beside a ground truth, as in the unpacked devkit."""
    if is_remote(address) or GROUND_TRUTH not in base_name(address):
        return None
    folder, slash, _ = address.rpartition("/")
    return _find(folder if slash else ".", META_FILE)


def _is_folder(address: str) -> bool:
    return StoragePath(address).kind().name == "Directory"


def _find(folder: str, name: str) -> str | None:
    for inner in _IN_FOLDER:
        address = child(folder, f"{inner}{name}")
        if StoragePath(address).kind().name == "File":
            return address
    return None


def _of_meta(data: bytes, *, name: str) -> dict[str, str]:
    try:
        rows = read_structs(data, name="synsets", fields=("ILSVRC2012_ID", "WNID"))
    except ValueError as error:
        raise ValueError(
            f"expected the devkit's {META_FILE} in {name}, got {error}"
        ) from None
    return {number: wnid.strip() for number, wnid in rows}


def _of_lines(text: str, *, name: str) -> dict[str, str]:
    lines = [line.replace(",", " ").split() for line in text.splitlines()]
    rows = [(line[0], line[-1] if len(line) < 2 else line[1]) for line in lines if line]
    if all(_WNID.fullmatch(first) for first, _ in rows):
        rows = [(number, wnid) for wnid, number in rows]
    if not rows or not all(number.isdigit() for number, _ in rows):
        raise ValueError(
            f"expected lines `ID WORDNET_ID` in {name}, got others (a list of class "
            "names, such as synset_words.txt, does not say the devkit's ids); give the "
            "devkit itself, ILSVRC2012_devkit_t12.tar.gz, or its meta.mat"
        )
    return dict(rows)
