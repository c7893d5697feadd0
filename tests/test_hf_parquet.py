"""Parquet as Hugging Face writes it: listed with its class names, unpacked whole."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.shards.hf_parquet import unpack
from pipelines.shards.sources import list_source


def write_parquet(path: Path, *, labels: list[int], names: list[str] | None) -> None:
    images = [
        {"bytes": bytes([i]) * i, "path": f"p{i}.jpg"} for i in range(len(labels))
    ]
    label = {"names": names, "_type": "ClassLabel"}
    info = {"info": {"features": {"label": label}}}
    table = pa.table({"image": images, "label": pa.array(labels, pa.int64())})
    metadata = {"huggingface": json.dumps(info)} if names else None
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table.replace_schema_metadata(metadata), path, row_group_size=2)


def test_parquet(tmp_path: Path) -> None:
    for part in range(2):
        path = tmp_path / "data" / f"train-{part:05d}-of-00002.parquet"
        write_parquet(path, labels=[0, 2, 1, 0, 1], names=["tench, Tinca", "b", "c"])
    listing = list_source(tmp_path)
    assert (listing.kind, listing.classes) == ("parquet", ["tench, Tinca", "b", "c"])
    assert listing.records["label"].to_pylist() == [0, 2, 1, 0, 1] * 2
    assert listing.records["offset"].to_pylist() == [0, 1, 2, 3, 4] * 2
    # Both files name their images alike, so the paths cannot be the keys.
    assert listing.records["key"][5].as_py() == "train-00001-of-00002.parquet#0"
    pattern = list_source(tmp_path / "data" / "train-00000*.parquet")
    assert pattern.records["key"].to_pylist() == [f"p{i}.jpg" for i in range(5)]


def test_bad_parquet_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "train-00000-of-00001.parquet"
    write_parquet(path, labels=[0, -1], names=["a", "b"])
    with pytest.raises(ValueError, match="from 0 to 1, got -1"):
        list_source(path)
    write_parquet(tmp_path / "test-00000-of-00001.parquet", labels=[0], names=None)
    with pytest.raises(ValueError, match="splits test, train"):
        list_source(tmp_path)
    pq.write_table(pa.table({"img": [b""]}), path)
    with pytest.raises(ValueError, match="columns image and label"):
        list_source(path)
    path.write_bytes(b"PAR1 not at all")
    with pytest.raises(ValueError, match="not a Parquet file"):
        list_source(path)


def test_unpacking_keeps_every_image_and_is_done_once(tmp_path: Path) -> None:
    path, blob = tmp_path / "x.parquet", tmp_path / "x.bin"
    write_parquet(path, labels=[0] * 7, names=None)
    unpack(path, blob=blob)
    bounds, data = np.load(tmp_path / "x.npy"), blob.read_bytes()
    images = [data[a:b] for a, b in itertools.pairwise(bounds)]
    assert images == [bytes([i]) * i for i in range(7)]
    assert bounds[-1] == len(data)
    path.unlink()
    unpack(path, blob=blob)  # would fail if it read again
    assert len(list(tmp_path.iterdir())) == 2
