"""Build small stand-ins for ImageNet's downloads, with their names and packing."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat

WNIDS = ["n01440764", "n01443537", "n02119789"]
"""Sorted, as training numbers them."""
OF_ID = {"1": "n02119789", "2": "n01440764", "3": "n01443537", "4": "n00001740"}
"""The devkit's own order; the last is no class, but one of their parents."""
GROUND_TRUTH = [2, 3, 1, 1, 3, 2]
COLOURS = {"n01440764": (250, 20, 20), "n01443537": (20, 250, 20)}
COLOURS |= {"n02119789": (20, 20, 250)}
NUM_TRAIN = 8


def photo(wnid: str, number: int) -> bytes:
    """Encode a picture of its class's colour, another for each number."""
    buffer = io.BytesIO()
    size = (40 + number, 32)
    Image.new("RGB", size, COLOURS[wnid]).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def tar_bytes(members: Mapping[str, bytes], *, mode: str = "w") -> bytes:
    """Pack files, in their order."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:  # type: ignore[call-overload]
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def meta_mat(*, compressed: bool = True, of_id: Mapping[str, str] = OF_ID) -> bytes:
    """Write meta.mat with the fields that the devkit's has."""
    fields = ["ILSVRC2012_ID", "WNID", "words", "gloss", "num_children", "children"]
    fields += ["wordnet_height", "num_train_images"]
    rows = np.zeros((len(of_id), 1), dtype=[(name, object) for name in fields])
    for place, (number, wnid) in enumerate(of_id.items()):
        children = np.array([1.0, 2.0, 3.0]) if number == "4" else np.zeros((0, 0))
        rows[place, 0] = (float(number), wnid, "kit fox, Vulpes macrotis", "a fox",
                          children.size, children, 0.0, 1300.0)  # fmt: skip
    buffer = io.BytesIO()
    savemat(buffer, {"other": [1.0], "synsets": rows}, do_compression=compressed)
    return buffer.getvalue()


def devkit(*, ground_truth: Sequence[int] = GROUND_TRUTH) -> dict[str, bytes]:
    """Build the devkit's files by their paths in it."""
    text = "".join(f"{number}\n" for number in ground_truth)
    return {
        "ILSVRC2012_devkit_t12/readme.txt": b"Introduction",
        "ILSVRC2012_devkit_t12/data/meta.mat": meta_mat(),
        "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt": (
            text.encode()
        ),
    }


def write_downloads(folder: Path) -> None:
    """Write both tars of images and the devkit."""
    inner = {
        f"{wnid}.tar": tar_bytes(
            {f"{wnid}_{i}.JPEG": photo(wnid, i) for i in range(NUM_TRAIN)}
        )
        for wnid in WNIDS
    }
    val = {
        f"ILSVRC2012_val_{place:08d}.JPEG": photo(OF_ID[str(number)], place)
        for place, number in enumerate(GROUND_TRUTH, start=1)
    }
    names = sorted(val, reverse=True)  # the labels go by name, not by place in the tar
    files = {
        "ILSVRC2012_img_train.tar": tar_bytes(inner),
        "ILSVRC2012_img_val.tar": tar_bytes({name: val[name] for name in names}),
        "ILSVRC2012_devkit_t12.tar.gz": tar_bytes(devkit(), mode="w:gz"),
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)
