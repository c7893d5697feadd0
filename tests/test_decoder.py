"""Decoders bound to their windows: what can't be decoded is named."""

from __future__ import annotations

import dataclasses
import importlib.util
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor

from pipelines.config import Data
from pipelines.ingest.augment import Geometry
from pipelines.ingest.decoder import decode_rows, make_decoder
from pipelines.ingest.feed import Rows
from pipelines.ingest.torch_decode import TorchDecoder, find_damaged
from tests.small_sets import jpeg

HAS_DALI = (
    importlib.util.find_spec("nvidia") is not None
    and importlib.util.find_spec("nvidia.dali") is not None
)
needs_dali = pytest.mark.skipif(not HAS_DALI, reason="DALI has no wheel here")
DATA = Data(train="t", val="v", batch_size=8)


def decoder_of(kind: Any) -> Any:
    data = dataclasses.replace(DATA, decoder=kind)
    device = torch.device("cpu")
    return make_decoder(data, img_size=64, batch_size=8, train=True, device=device)


def rows_with(encoded: list[bytes]) -> Rows:
    return Rows(
        views=[np.frombuffer(data, np.uint8) for data in encoded],
        labels=np.zeros(len(encoded), np.int64),
        ids=np.arange(40, 40 + len(encoded)),
        heights=np.full(len(encoded), 60),
        widths=np.full(len(encoded), 80),
        keys=pa.array([f"photo/{i}.jpg" for i in range(len(encoded))]),
    )


@pytest.mark.parametrize("kind", ["torch", pytest.param("dali", marks=needs_dali)])
@pytest.mark.parametrize("damage", ["cut", "no image", "empty"])
def test_an_image_that_does_not_decode_is_named(kind: Any, damage: str) -> None:
    good = jpeg(3, size=(80, 60))
    bad = {"cut": good[:-300], "no image": b"<html>" * 20, "empty": b""}[damage]
    decode = decode_rows(decoder_of(kind), data=DATA, img_size=64, seed=0, train=False)
    with pytest.raises(ValueError, match=r"photo/2\.jpg, row 42 .* sovit-shards"):
        decode(rows_with([good, good, bad, good]), 0)
    # The decoder goes on with the next batch.
    assert decode(rows_with([good] * 3), 0).shape == (3, 3, 64, 64)


def test_other_errors_of_a_decoder_pass_as_they_are() -> None:
    def broken(encoded: list[np.ndarray], geometry: Geometry) -> Tensor:
        raise RuntimeError("out of memory")

    decode = decode_rows(broken, data=DATA, img_size=64, seed=0, train=True)
    with pytest.raises(RuntimeError, match="out of memory"):
        decode(rows_with([jpeg(3, size=(80, 60))]), 0)
    assert find_damaged([jpeg(1), jpeg(2)]) is None
    assert find_damaged([jpeg(1), b"x"]) == 1


def test_training_windows_follow_the_epoch() -> None:
    seen = []

    def keep(encoded: list[np.ndarray], geometry: Geometry) -> Tensor:
        seen.append(geometry.window.tolist())
        return torch.zeros(len(encoded), 3, 64, 64)

    rows = rows_with([jpeg(3, size=(80, 60))] * 5)
    decode = decode_rows(keep, data=DATA, img_size=64, seed=0, train=True)
    for epoch in (0, 1, 0):
        decode(rows, epoch)
    assert seen[0] == seen[2] != seen[1]
    decode = decode_rows(keep, data=DATA, img_size=64, seed=0, train=False)
    decode(rows, 0)
    assert seen[3] == [[60, 80]] * 5


def test_dali_that_is_asked_for_and_missing_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"--data\.decoder torch"):
        decoder_of("dali")
    assert isinstance(decoder_of("auto"), TorchDecoder)
