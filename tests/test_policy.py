"""RandAugment's texts: read as timm reads them, refused where timm guesses."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.data.auto_augment import RandAugment as TimmRandAugment
from timm.data.auto_augment import rand_augment_transform

from pipelines.config import RandAugment, parse_rand_augment

NUMBERS = {
    "m": st.integers(0, 40).map(str),
    "n": st.integers(1, 6).map(str),
    "mstd": st.decimals(0, 150, places=2).map(str),
    "mmax": st.integers(1, 40).map(str),
    "inc": st.sampled_from(["0", "1"]),
    "p": st.decimals(0, 1, places=2).map(str),
}


@st.composite
def texts(draw: st.DrawFn) -> str:
    keys = draw(st.lists(st.sampled_from(sorted(NUMBERS)), unique=True))
    return "-".join(["rand", *(key + draw(NUMBERS[key]) for key in keys)])


def timms(text: str) -> tuple[TimmRandAugment, RandAugment]:
    transform = rand_augment_transform(text, {})
    first = transform.ops[0]
    return transform, RandAugment(
        magnitude=first.magnitude,
        num_layers=transform.num_layers,
        magnitude_std=first.magnitude_std,
        magnitude_max=first.magnitude_max or 10,
        increasing=any(op.name == "ColorIncreasing" for op in transform.ops),
        prob=first.prob,
    )


@given(text=texts())
@settings(max_examples=200)
def test_a_text_means_what_it_means_to_timm(text: str) -> None:
    transform, wanted = timms(text)
    assert parse_rand_augment(text) == wanted
    assert transform.choice_weights is None
    assert len(transform.ops) == 15


def test_the_recipes_text_is_read() -> None:
    assert parse_rand_augment("rand-m9-mstd0.5-inc1") == RandAugment(
        magnitude=9, magnitude_std=0.5, increasing=True
    )
    assert parse_rand_augment("rand-mstd101").magnitude_std == math.inf
    assert parse_rand_augment("rand") == RandAugment()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "begin with rand"),
        ("original-mstd0.5", "begin with rand"),
        ("rand-", "got '' in 'rand-'"),
        ("rand-x3", r"m \(magnitude\), n .* mstd .* mmax .* inc .* p "),
        ("rand-M9", "expected any of m"),
        ("rand-m9-9", "expected any of m"),
        ("rand-mstd.5", "expected any of m|expected mstd"),
        ("rand-w0", "remove this part"),
        ("rand-tweights", "remove this part"),
        ("rand-m", "m with a whole number, at least 0, got 'm'"),
        ("rand-m9.5", "m with a whole number"),
        ("rand-m-1", "m with a whole number"),
        ("rand-n0", "n with a whole number, at least 1"),
        ("rand-mmax0", "mmax with a whole number, at least 1"),
        ("rand-p1.1", "p with a number from 0 to 1"),
        ("rand-mstdnan", "got 'mstdnan'"),
        ("rand-m9\n", "m with a whole number"),
        ("rand-m9-m8", "each key once"),
    ],
)
def test_other_texts_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_rand_augment(text)
