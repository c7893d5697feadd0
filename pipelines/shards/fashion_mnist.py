"""Makes the Fashion-MNIST shard sets of the demo out of the four idx files.

python -m pipelines.shards.fashion_mnist IDX_DIR OUT [--whole]

Fashion-MNIST (Xiao, Rasul and Vollgraf, 2017): 28x28 grey photographs of clothes in
10 classes. The embedded choice is balanced: 1,200 training and 200 test images a class.
"""

from __future__ import annotations

import gzip
import io
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import tyro
from PIL import Image

from pipelines.data.shard_set import (
    CLASSES_FILE,
    cut_evenly,
    shard_name,
    write_json,
    write_shard,
)
from pipelines.rng import seeded_order

CLASS_NAMES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
SEED = 0
# Grey JPEG at 90 with the standard tables: 1.7 grey levels of mean error, 742 bytes an
# image, of which zstd takes almost half away since the tables are all the same.
QUALITY = 90
ROWS_PER_GROUP = 250


@dataclass(frozen=True)
class Split:
    """One half of the data: the idx files' prefix and how much of it is taken."""

    name: str
    prefix: str
    images_per_class: int
    rows_per_shard: int


SPLITS = (
    Split("train", prefix="train", images_per_class=1_200, rows_per_shard=1_500),
    Split("val", prefix="t10k", images_per_class=200, rows_per_shard=1_000),
)


def read_idx(path: Path) -> np.ndarray:
    """Read a gzipped idx file of bytes into a uint8 array of the shape it names.

    Raises:
        ValueError: The file is not an idx file of unsigned bytes, or is cut short.
    """
    data = gzip.decompress(path.read_bytes())
    if len(data) < 4 or data[:3] != b"\0\0\x08":
        raise ValueError(f"expected a gzipped idx file of unsigned bytes, got {path}")
    start = 4 + 4 * data[3]
    shape = struct.unpack(f">{data[3]}I", data[4:start])
    if len(data) - start != np.prod(shape):
        raise ValueError(f"{path} names shape {shape} but holds {len(data) - start} B.")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def choose(labels: np.ndarray, *, images_per_class: int | None) -> np.ndarray:
    """Choose a balanced subset, in a seeded order; all images where None is asked.

    Args:
        labels: Class of each image, shape (num_images,).
        images_per_class: How many to take of each class.

    Returns:
        Indices of the chosen images, shape (num_classes * images_per_class,).
    """
    order = seeded_order(len(labels), key=SEED)
    if images_per_class is None:
        return order
    ranks = np.empty(len(labels), dtype=np.int64)
    for label in np.unique(labels):
        places = np.flatnonzero(labels[order] == label)
        ranks[places] = np.arange(len(places))
    chosen = order[ranks < images_per_class]
    # Once more: at the end of the first order only the slowest classes were left.
    return chosen[seeded_order(len(chosen), key=SEED + 1)]


def encode(pixels: np.ndarray) -> bytes:
    """Encode grey pixels (28, 28) as JPEG."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()


def write_split(
    folder: Path, *, idx_dir: Path, split: Split, whole: bool = False
) -> int:
    """Write one split as a shard set into `folder`; return its number of rows."""
    images = read_idx(idx_dir / f"{split.prefix}-images-idx3-ubyte.gz")
    labels = read_idx(idx_dir / f"{split.prefix}-labels-idx1-ubyte.gz")
    per_class = None if whole else split.images_per_class
    chosen = choose(labels, images_per_class=per_class)
    folder.mkdir(parents=True, exist_ok=True)
    num_shards = max(1, len(chosen) // split.rows_per_shard)
    bounds = cut_evenly(len(chosen), num_parts=num_shards)
    for index in range(num_shards):
        rows = chosen[bounds[index] : bounds[index + 1]]
        write_shard(
            folder / shard_name(split.name, index=index, num_shards=num_shards),
            rows=pa.Table.from_pylist(list(_records(rows, images, labels, split))),
            rows_per_group=ROWS_PER_GROUP,
            image_compression="zstd",
        )
    write_json(folder / CLASSES_FILE, value=list(CLASS_NAMES))
    return len(chosen)


def _records(
    rows: np.ndarray, images: np.ndarray, labels: np.ndarray, split: Split
) -> Iterator[dict[str, object]]:
    for row in rows:
        yield {
            "image": encode(images[row]),
            "label": int(labels[row]),
            "key": f"{split.prefix}/{row:05d}.jpg",
            "width": images.shape[2],
            "height": images.shape[1],
        }


@dataclass(frozen=True)
class Arguments:
    """Make Fashion-MNIST shard sets OUT/train and OUT/val.

    Attributes:
        idx_dir: Folder of the four gzipped idx files, with their first names.
        out: Folder to write to.
        whole: Take all 60,000 + 10,000 images, not 12,000 + 2,000.
    """

    idx_dir: tyro.conf.Positional[Path]
    out: tyro.conf.Positional[Path]
    whole: bool = False


def main() -> None:
    """Run the command line."""
    arguments = tyro.cli(Arguments)
    try:
        for split in SPLITS:
            folder = arguments.out / split.name
            num_rows = write_split(
                folder, idx_dir=arguments.idx_dir, split=split, whole=arguments.whole
            )
            print(f"{num_rows:,} images in {folder}")
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
