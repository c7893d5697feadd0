"""DALI's graph of operations, on its CPU backend: Pillow's pixels, for any batch."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.photographs import cut_photographs
from pipelines.config import parse_rand_augment
from pipelines.transforms.color_ops import Op, Ops, color_jitter, rand_augment
from pipelines.transforms.pillow_ops import apply_ops

if importlib.util.find_spec("nvidia") is None:
    pytest.skip("DALI has no wheel here", allow_module_level=True)
pytest.importorskip("nvidia.dali", reason="DALI has no wheel here")

FILL = (124, 116, 104)
SIZE = 224


class Graph:
    """Run operations through a pipeline of their own."""

    def __init__(
        self,
        *,
        num_columns: int,
        batch_size: int,
        num_threads: int = 1,
        device_id: int | None = None,
    ) -> None:
        from nvidia.dali.pipeline import pipeline_def

        from pipelines.transforms.dali_ops import op_inputs

        self._inputs_of = op_inputs
        self._num_columns = num_columns
        self._on_gpu = device_id is not None
        define: Any = pipeline_def
        self._pipeline = define(self._images, enable_conditionals=True)(
            batch_size=batch_size,
            num_threads=num_threads,
            device_id=device_id,
            prefetch_queue_depth=1,
        )
        self._pipeline.build()

    def _images(self) -> Any:
        import nvidia.dali.fn as fn
        import nvidia.dali.types as types

        from pipelines.transforms import dali_ops

        uint8 = types.DALIDataType.UINT8
        images: Any = fn.external_source(
            name="images", dtype=uint8, ndim=3, layout="HWC"
        )
        return dali_ops.apply_ops(
            images.gpu() if self._on_gpu else images,
            num_columns=self._num_columns,
            img_size=SIZE,
            fill=FILL,
        )

    def __call__(self, images: np.ndarray, ops: Ops) -> np.ndarray:
        self._pipeline.feed_input("images", images, layout="HWC")
        for name, value in self._inputs_of(ops, img_size=SIZE).items():
            self._pipeline.feed_input(name, value)
        found = self._pipeline.run()[0].as_cpu()
        return np.stack([np.array(found.at(at)) for at in range(len(images))])


def one_op(op: Op, arg: float, *, num: int, bicubic: bool = False) -> Ops:
    return Ops(
        ids=np.full((num, 1), op, dtype=np.int64),
        args=np.full((num, 1), arg),
        bicubic=np.full((num, 1), bicubic),
    )


def pillows(images: np.ndarray, ops: Ops) -> np.ndarray:
    found = [
        apply_ops(
            pixels,
            ids=ops.ids[at],
            args=ops.args[at],
            bicubic=ops.bicubic[at],
            fill=FILL,
        )
        for at, pixels in enumerate(images)
    ]
    return np.stack(found)


def apart(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Give the distance of pixels in levels."""
    return np.abs(one.astype(int) - other.astype(int))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    folder: Path = tmp_path_factory.mktemp("photographs")
    paths = cut_photographs(folder, num_images=10, seed=6)
    kind = Image.Resampling.BICUBIC
    return np.stack([np.array(Image.open(p).resize((SIZE, SIZE), kind)) for p in paths])


@pytest.fixture(scope="module")
def graph() -> Graph:
    return Graph(num_columns=1, batch_size=10)


EXACT = [
    (Op.IDENTITY, 0),
    (Op.INVERT, 0),
    *((Op.POSTERIZE, bits) for bits in (-2, 0, 1, 3, 4, 8)),
    *((Op.SOLARIZE, least) for least in (0, 1, 26, 128, 255, 256)),
    *((Op.SOLARIZE_ADD, added) for added in (0, 1, 99, 128)),
]


@pytest.mark.parametrize(("op", "arg"), EXACT)
def test_remapped_levels_are_pillows(
    images: np.ndarray, graph: Graph, op: Op, arg: float
) -> None:
    ops = one_op(op, arg, num=len(images))
    assert np.array_equal(graph(images, ops), pillows(images, ops))


@pytest.mark.parametrize("factor", [0.1, 0.37, 1.0, 1.81, 1.9])
@pytest.mark.parametrize("op", [Op.COLOR, Op.CONTRAST, Op.BRIGHTNESS, Op.SHARPNESS])
def test_enhanced_pixels_are_pillows(
    images: np.ndarray, graph: Graph, op: Op, factor: float
) -> None:
    ops = one_op(op, factor, num=len(images))
    distance = apart(graph(images, ops), pillows(images, ops))
    # One fraction in a thousand is within 0.001 of the next whole number and not cut.
    # Grey is rounded from floats, from fixed point in Pillow; where that turns the mean
    # of an image, contrast is a level off in all of it.
    assert distance.max() <= 1
    by_image = (distance > 0).mean(axis=(1, 2, 3))
    assert (by_image > 0.004).sum() <= (2 if op == Op.CONTRAST else 0)


MOVES = [
    *((Op.ROTATE, degrees) for degrees in (0.0, 17.3, -30.0, 44.0)),
    *((op, part) for op in (Op.SHEAR_X, Op.SHEAR_Y) for part in (0.27, -0.13)),
    *((op, part) for op in (Op.TRANSLATE_X, Op.TRANSLATE_Y) for part in (0.41, -0.2)),
]


@pytest.mark.parametrize(("op", "arg"), MOVES)
def test_bilinearly_moved_pixels_are_pillows(
    images: np.ndarray, graph: Graph, op: Op, arg: float
) -> None:
    ops = one_op(op, arg, num=len(images))
    distance = apart(graph(images, ops), pillows(images, ops))
    # Where the exact result is a whole number, as often at a shift of a fifth, Pillow's
    # doubles come out a little below. And float32 may put a place on the other side of
    # the border, where the fill begins.
    assert np.quantile(distance, 0.9999) <= 1
    assert (distance > 0).mean() < (0.06 if arg in (-0.2, 0.2) else 0.01)


@pytest.mark.parametrize(("op", "arg"), MOVES)
def test_bicubic_moves_are_bilinear_here(
    images: np.ndarray, graph: Graph, op: Op, arg: float
) -> None:
    ops = one_op(op, arg, num=len(images), bicubic=True)
    found, wanted = graph(images, ops), pillows(images, ops)
    assert np.array_equal(found, graph(images, one_op(op, arg, num=len(images))))
    # The same picture, softer: edges differ by tens of levels, the mean does not.
    assert apart(found, wanted).mean() < 4
    assert abs(found.mean() - wanted.mean()) < 0.2


def test_equalized_pixels_are_pillows_within_two_levels(
    images: np.ndarray, graph: Graph
) -> None:
    ops = one_op(Op.EQUALIZE, 0, num=len(images))
    distance = apart(graph(images, ops), pillows(images, ops))
    # Pillow divides counts by a whole number of pixels a level: of up to 196.8, 196.
    assert distance.max() <= 2
    assert distance.mean() < 0.6


def test_stretched_pixels_are_pillows(images: np.ndarray, graph: Graph) -> None:
    # Narrowed, so that there is something to stretch, each channel otherwise.
    narrow = (images * [0.4, 0.7, 1.0] + [90, 0, 0]).astype(np.uint8)
    ops = one_op(Op.AUTO_CONTRAST, 0, num=len(images))
    distance = apart(graph(narrow, ops), pillows(narrow, ops))
    # Whole numbers that Pillow's floats come out a little below of.
    assert distance.max() <= 1
    assert (distance > 0).mean() < 0.05


@pytest.mark.parametrize("op", [Op.AUTO_CONTRAST, Op.EQUALIZE, Op.CONTRAST, Op.COLOR])
@pytest.mark.parametrize("levels", [(0, 0, 0), (255, 255, 255), (7, 130, 249)])
def test_images_of_one_colour_stay(
    graph: Graph, op: Op, levels: tuple[int, int, int]
) -> None:
    flat = np.full((1, SIZE, SIZE, 3), levels, np.uint8)
    ops = one_op(op, 1.0 if op in (Op.CONTRAST, Op.COLOR) else 0.0, num=1)
    assert np.array_equal(graph(flat, ops), flat)
    assert np.array_equal(pillows(flat, ops), flat)


def recipes_ops(num: int, *, num_layers: int) -> Ops:
    return rand_augment(
        np.arange(num),
        policy=parse_rand_augment(f"rand-m9-n{num_layers}-mstd0.5-inc1-p0.8"),
        seed=0,
        epoch=0,
        interpolation="bilinear",
    )


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 120])
def test_operations_beside_each_other_are_pillows(
    images: np.ndarray, batch_size: int
) -> None:
    many = np.tile(images, (12, 1, 1, 1))
    ops = recipes_ops(len(many), num_layers=1)
    graph = Graph(num_columns=1, batch_size=batch_size)
    for start in range(0, len(many), batch_size):
        part = slice(start, start + batch_size)
        taken = take(ops, part)
        distance = apart(graph(many[part], taken), pillows(many[part], taken))
        assert distance.mean(axis=(1, 2, 3)).max() < 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpus_pixels_are_pillows(images: np.ndarray) -> None:
    many = np.tile(images, (12, 1, 1, 1))
    ops = recipes_ops(len(many), num_layers=1)
    graph = Graph(num_columns=1, batch_size=len(many), device_id=0)
    distance = apart(graph(many, ops), pillows(many, ops))
    assert distance.mean(axis=(1, 2, 3)).max() < 1


def test_operations_come_one_after_another(images: np.ndarray) -> None:
    many = np.tile(images, (12, 1, 1, 1))
    graph = Graph(num_columns=3, batch_size=len(many))
    for ops in (
        recipes_ops(len(many), num_layers=3),
        color_jitter(np.arange(len(many)), strength=0.4, seed=0, epoch=0),
    ):
        found, wanted = graph(many, ops), pillows(many, ops)
        by_image = apart(found, wanted).mean(axis=(1, 2, 3))
        # The next operation may make much of a level: solarize it on the other side, or
        # posterize it.
        assert np.median(by_image) < 0.1
        assert np.quantile(by_image, 0.97) < 3
        assert abs(found.mean() - wanted.mean()) < 0.3


@pytest.mark.parametrize(("batch_size", "num_threads"), [(1, 1), (7, 1), (64, 2)])
def test_pixels_do_not_depend_on_order_batch_or_threads(
    images: np.ndarray, batch_size: int, num_threads: int
) -> None:
    many = np.tile(images, (4, 1, 1, 1))
    ops = recipes_ops(len(many), num_layers=3)
    whole = Graph(num_columns=3, batch_size=len(many))(many, ops)
    graph = Graph(num_columns=3, batch_size=batch_size, num_threads=num_threads)
    order = np.random.default_rng(0).permutation(len(many))
    for start in range(0, len(many), batch_size):
        part = order[start : start + batch_size]
        assert np.array_equal(graph(many[part], take(ops, part)), whole[part])


def take(ops: Ops, places: Any) -> Ops:
    return Ops(**{name: value[places] for name, value in vars(ops).items()})
