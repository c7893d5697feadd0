"""RandAugment's text is read as timm reads it."""

from __future__ import annotations

import math

import pytest
from timm.data.auto_augment import rand_augment_transform

from pipelines.ingest.policy import RandAugment, parse_rand_augment


@pytest.mark.parametrize(
    "text",
    [
        "rand-m9-mstd0.5-inc1",
        "rand-m9-n3-mstd0.5",
        "rand-m7-mstd101-inc1",
        "rand-m15-mmax20-p0.8",
        "rand-inc1-m4-n1",
        "rand-m0",
    ],
)
def test_the_settings_are_those_that_timm_builds(text: str) -> None:
    found = parse_rand_augment(text)
    timms = rand_augment_transform(text, {})
    assert found.num_layers == timms.num_layers
    assert len(timms.ops) == 15
    for op in timms.ops:
        assert op.prob == found.prob
        assert op.magnitude == found.magnitude
        assert op.magnitude_std == found.magnitude_std
        assert (op.magnitude_max or 10) == found.magnitude_max
    names = {op.name for op in timms.ops}
    assert ("PosterizeIncreasing" in names) == found.increasing
    assert ("ColorIncreasing" in names) == found.increasing


def test_the_papers_policy() -> None:
    assert parse_rand_augment("rand-m9-mstd0.5-inc1") == RandAugment(
        magnitude=9, num_layers=2, magnitude_std=0.5, increasing=True, prob=0.5
    )
    assert parse_rand_augment("rand-mstd101").magnitude_std == math.inf


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("randy-m9", "begin with rand"),
        ("", "begin with rand"),
        ("rand-m9-m8", "once"),
        ("rand-x3", r"m \(magnitude\)"),
        ("rand-m", "whole number"),
        ("rand-m-3", "whole number"),
        ("rand-m9.5", "whole number"),
        ("rand-n0", "at least 1"),
        ("rand-p1.5", "to 1"),
        ("rand-w0", "left out"),
        ("rand-t1", "left out"),
    ],
)
def test_what_can_not_be_read_is_refused(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parse_rand_augment(text)
