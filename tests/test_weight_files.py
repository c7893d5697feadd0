"""Files of weights that are damaged."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pytest
import torch

from sovit.weights.weight_files import read_tensors


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("zipped", [True, False])
def test_file_that_is_damaged_is_refused_or_read(tmp_path: Path, zipped: bool) -> None:
    """Whatever byte is another, nothing but ValueError comes of it."""
    path, rng = tmp_path / "damaged.pth", np.random.default_rng(0)
    content = {"state_dict": {"w": torch.ones(3)}, "args": argparse.Namespace(lr=1)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    whole, num_refused = path.read_bytes(), 0
    for _ in range(200):
        damaged = bytearray(whole[: rng.integers(1, len(whole) + 1)])
        damaged[rng.integers(len(damaged))] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            read_tensors(path)
        except ValueError:
            num_refused += 1
    assert num_refused > 150
