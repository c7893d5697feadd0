"""The photographs for tests and benchmarks are like ImageNet's files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def test_photographs_are_like_imagenet_and_repeatable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The benchmarks are not installed with the package.
    monkeypatch.syspath_prepend(Path(__file__).parents[1])
    from benchmarks.photographs import cut_photographs

    paths = cut_photographs(tmp_path / "a", num_images=40, seed=0)
    sizes = [Image.open(path).size for path in paths]
    assert len({path.read_bytes() for path in paths}) == 40
    assert all(318 <= side <= 575 for size in sizes for side in size)
    assert 90_000 < np.mean([path.stat().st_size for path in paths]) < 120_000
    again = cut_photographs(tmp_path / "b", num_images=5, seed=0)
    assert [p.read_bytes() for p in again] == [p.read_bytes() for p in paths[:5]]
    other = cut_photographs(tmp_path / "c", num_images=1, seed=1)
    assert other[0].read_bytes() != paths[0].read_bytes()
