"""Screening: most damage shows in the bytes, and nothing odd is taken for damage."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.transforms.fault_isolation import screen
from tests.odd_images import GOOD, SIZE, bad_images, odd_images

# These look whole: the decoder has to find them.
DEEP = {"broken Huffman table"}


def screened(data: bytes, *, size: tuple[int, int] = SIZE) -> str:
    return screen(np.frombuffer(data, np.uint8), height=size[1], width=size[0])


@pytest.mark.parametrize("name", bad_images())
def test_damage_is_seen_and_said(name: str) -> None:
    said = screened(bad_images()[name])
    assert (said == "") == (name in DEEP)
    if "cut" in name and "%" in name:
        assert "cut off" in said


@pytest.mark.parametrize("name", odd_images())
def test_odd_images_pass(name: str) -> None:
    assert screened(odd_images()[name]) == ""


@given(share=st.floats(0, 1, exclude_max=True))
def test_a_jpeg_cut_anywhere_is_seen(share: float) -> None:
    # Without its last byte it still is a picture to most decoders, but not whole.
    assert screened(GOOD[: int(len(GOOD) * share)]) != ""


@given(st.binary(max_size=300))
def test_any_bytes_are_answered(data: bytes) -> None:
    assert isinstance(screened(data), str)
    assert isinstance(screened(b"\xff\xd8\xff" + data), str)
    assert isinstance(screened(b"\x89PNG\r\n\x1a\n" + data), str)


@pytest.mark.parametrize("size", [(0, 10), (-1, 5), (20_000, 20_000)])
def test_sizes_that_no_photograph_has_are_refused(size: tuple[int, int]) -> None:
    assert "pixels" in screened(GOOD, size=size)
