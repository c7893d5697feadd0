"""The embedded Fashion-MNIST: whole, balanced, decodable, and made again alike."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import struct
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines.data.shard_set import SCHEMA
from pipelines.shards.fashion_mnist import (
    CLASS_NAMES,
    SPLITS,
    choose,
    read_idx,
    write_split,
)

SET = Path(__file__).parents[1] / "recipes" / "fashion_mnist"
IDX_DIR = Path("/usr/share/datasets/fashion-mnist")
needs_idx = pytest.mark.skipif(
    not (IDX_DIR / "train-images-idx3-ubyte.gz").exists(),
    reason="needs Debian's package dataset-fashion-mnist",
)


def read_rows(folder: Path) -> pa.Table:
    return pa.concat_tables(pq.read_table(p) for p in sorted(folder.glob("*.parquet")))


def test_every_file_has_its_digest() -> None:
    lines = (SET / "SHA256SUMS").read_text().splitlines()
    wanted = {name: digest for digest, name in map(str.split, lines)}
    found = {
        path.relative_to(SET).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for split in SPLITS
        for path in (SET / split.name).iterdir()
    }
    assert found == wanted
    assert len(found) == 8 + 2 + 2
    assert sum((SET / name).stat().st_size for name in found) <= 8_000_000


@pytest.mark.parametrize(("name", "count"), [("train", 1_200), ("val", 200)])
def test_set_is_balanced_and_decodable(name: str, count: int) -> None:
    rows = read_rows(SET / name)
    assert rows.schema.equals(SCHEMA)
    assert np.bincount(rows["label"].to_numpy()).tolist() == [count] * 10
    assert len(set(rows["key"].to_pylist())) == len(rows)
    assert json.loads((SET / name / "classes.json").read_text()) == list(CLASS_NAMES)
    for data in rows["image"].to_pylist()[::7]:
        image = Image.open(io.BytesIO(data))
        image.load()
        assert (image.format, image.mode, image.size) == ("JPEG", "L", (28, 28))
    assert set(rows["width"].to_pylist()) == set(rows["height"].to_pylist()) == {28}


def test_row_groups_are_small_and_labels_mixed() -> None:
    for path in sorted(SET.glob("*/*.parquet")):
        shard = pq.ParquetFile(path)
        for group in range(shard.num_row_groups):
            labels = shard.read_row_group(group, columns=["label"])["label"].to_numpy()
            assert len(labels) == 250
            # 250 random labels of ten classes: 25 each, give or take 4.7.
            assert np.bincount(labels, minlength=10).min() >= 5


@needs_idx
@pytest.mark.parametrize("split", SPLITS, ids=lambda split: split.name)
def test_made_again_it_is_the_same(tmp_path: Path, split) -> None:
    write_split(tmp_path, idx_dir=IDX_DIR, split=split)
    committed = sorted((SET / split.name).iterdir())
    assert [p.name for p in sorted(tmp_path.iterdir())] == [p.name for p in committed]
    assert read_rows(tmp_path).equals(read_rows(SET / split.name))
    writers = {pq.read_metadata(p).created_by for p in SET.glob("*/*.parquet")}
    if writers == {f"parquet-cpp-arrow version {pa.__version__}"}:
        for path in committed:
            assert (tmp_path / path.name).read_bytes() == path.read_bytes()


@needs_idx
def test_rows_are_the_idx_images() -> None:
    rows = read_rows(SET / "val").slice(0, 50).to_pylist()
    images = read_idx(IDX_DIR / "t10k-images-idx3-ubyte.gz")
    labels = read_idx(IDX_DIR / "t10k-labels-idx1-ubyte.gz")
    for row in rows:
        place = int(row["key"].removeprefix("t10k/").removesuffix(".jpg"))
        pixels = np.asarray(Image.open(io.BytesIO(row["image"])), dtype=np.int16)
        assert row["label"] == labels[place]
        assert np.abs(pixels - images[place]).mean() < 6


def write_idx(path: Path, array: np.ndarray) -> None:
    header = struct.pack(f">I{array.ndim}I", 0x800 + array.ndim, *array.shape)
    path.write_bytes(gzip.compress(header + array.tobytes()))


def test_whole_takes_every_image(tmp_path: Path) -> None:
    pixels = np.arange(30 * 784, dtype=np.uint32).astype(np.uint8).reshape(30, 28, 28)
    write_idx(tmp_path / "t10k-images-idx3-ubyte.gz", pixels)
    labels = np.repeat(np.arange(10, dtype=np.uint8), 3)
    write_idx(tmp_path / "t10k-labels-idx1-ubyte.gz", labels)
    out = tmp_path / "out"
    assert write_split(out, idx_dir=tmp_path, split=SPLITS[1], whole=True) == 30
    assert sorted(read_rows(out)["label"].to_pylist()) == labels.tolist()


def test_choice_is_balanced_on_uneven_labels() -> None:
    labels = np.repeat(np.arange(4), [5, 9, 30, 6])
    chosen = choose(labels, images_per_class=5)
    assert np.bincount(labels[chosen]).tolist() == [5, 5, 5, 5]
    assert len(set(chosen.tolist())) == 20


def test_bad_idx_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "labels.gz"
    path.write_bytes(gzip.compress(b"\0\0\x0d\1\0\0\0\1abcd"))
    with pytest.raises(ValueError, match="unsigned bytes"):
        read_idx(path)
    write_idx(path, np.zeros(9, np.uint8))
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-1]))
    with pytest.raises(ValueError, match="holds 8 B"):
        read_idx(path)
