"""On the CPU operations are timm's, bit for bit."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from PIL import Image
from timm.data import auto_augment as timm_ops
from timm.data.auto_augment import rand_augment_transform

from benchmarks.photographs import cut_photographs
from pipelines.ingest.ops import Op, rand_augment
from pipelines.ingest.pillow_ops import apply_ops
from pipelines.ingest.policy import parse_rand_augment

FILL = (124, 116, 104)
POLICY = "rand-m9-mstd0.5-inc1"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[np.ndarray]:
    folder = tmp_path_factory.mktemp("photographs")
    paths = cut_photographs(folder, num_images=6, seed=5)
    return [
        np.asarray(Image.open(path).convert("RGB").resize((96, 96))) for path in paths
    ]


def applied(pixels: np.ndarray, *, op: int, arg: float, bicubic: bool = False) -> Any:
    return apply_ops(
        pixels,
        ids=np.array([op]),
        args=np.array([arg]),
        bicubic=np.array([bicubic]),
        fill=FILL,
    )


def test_the_same_numbers_give_timms_pixels(
    pictures: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Let timm's own AugmentOp take our numbers instead of its random ones."""
    policy = parse_rand_augment(POLICY)
    drawn = rand_augment(
        np.arange(400), policy=policy, seed=0, epoch=0, interpolation="random"
    )
    timms = rand_augment_transform(POLICY, {"img_mean": FILL})
    seen = set()
    for at in range(400):
        pixels = pictures[at % len(pictures)]
        image = Image.fromarray(pixels)
        for op, arg, bicubic in zip(
            drawn.ids[at], drawn.args[at], drawn.bicubic[at], strict=True
        ):
            if op == Op.IDENTITY:
                continue
            timm_op = timms.ops[op - 1]
            kind = timm_ops._RANDOM_INTERPOLATION[int(bicubic)]
            # Pillow 13 refuses what timm asks of it at magnitude 10.
            if op == Op.POSTERIZE and arg < 1:
                continue
            monkeypatch.setattr(
                timm_ops.random, "choice", lambda kinds, kind=kind: kind
            )
            arguments = () if timm_op.level_fn is None else (arg,)
            if op in (Op.POSTERIZE, Op.SOLARIZE, Op.SOLARIZE_ADD):
                arguments = (int(arg),)
            image = timm_op.aug_fn(image, *arguments, **timm_op.kwargs)
            seen.add(int(op))
        found = apply_ops(
            pixels,
            ids=drawn.ids[at],
            args=drawn.args[at],
            bicubic=drawn.bicubic[at],
            fill=FILL,
        )
        if not ((drawn.ids[at] == Op.POSTERIZE) & (drawn.args[at] < 1)).any():
            assert np.array_equal(found, np.asarray(image))
    assert len(seen) == 15


def test_augmented_pixels_have_the_moments_of_timms(
    pictures: list[np.ndarray],
) -> None:
    policy = parse_rand_augment(POLICY)
    num = 600
    drawn = rand_augment(
        np.arange(num), policy=policy, seed=3, epoch=0, interpolation="random"
    )
    timms = rand_augment_transform(POLICY, {"img_mean": FILL})
    random.seed(11)
    np.random.seed(11)  # timm chooses operations with NumPy
    found: dict[str, list[tuple[float, float]]] = {"ours": [], "timm": []}
    for at in range(num):
        pixels = pictures[at % len(pictures)]
        ours = apply_ops(
            pixels,
            ids=drawn.ids[at],
            args=drawn.args[at],
            bicubic=drawn.bicubic[at],
            fill=FILL,
        )
        try:
            theirs = np.asarray(timms(Image.fromarray(pixels)))
        except ValueError:  # Pillow 13 and no bits: see pillow_ops
            theirs = np.zeros_like(pixels)
        for name, image in (("ours", ours), ("timm", theirs)):
            found[name].append((image.mean(), image.std()))
    means = {name: np.mean(values, axis=0) for name, values in found.items()}
    errors = np.std(found["timm"], axis=0) * (2 / num) ** 0.5
    assert (np.abs(means["ours"] - means["timm"]) < 4 * errors).all()
    spread = [np.std(values, axis=0) for values in found.values()]
    assert np.allclose(spread[0], spread[1], rtol=0.2)


def test_nothing_is_done_and_copied_for_identities(pictures: list[np.ndarray]) -> None:
    assert applied(pictures[0], op=0, arg=3.0) is pictures[0]


def test_no_bits_are_black_and_eight_bits_are_all(pictures: list[np.ndarray]) -> None:
    assert not applied(pictures[0], op=Op.POSTERIZE, arg=0).any()
    whole = applied(pictures[0], op=Op.POSTERIZE, arg=8)
    assert np.array_equal(whole, pictures[0])


def test_pixels_of_any_strides_are_taken(pictures: list[np.ndarray]) -> None:
    mirrored = pictures[0][:, ::-1]
    found = applied(mirrored, op=Op.INVERT, arg=0)
    assert np.array_equal(found, 255 - mirrored)
