"""DALI and Pillow agree, on every format, for any order and batch."""

from __future__ import annotations

import dataclasses
import importlib.util
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from benchmarks.photographs import cut_photographs
from pipelines.config import Data, Interpolation
from pipelines.ingest.augment import Geometry, center_crop, random_resized_crop
from pipelines.ingest.decoder import make_decoder
from pipelines.ingest.torch_decode import TorchDecoder, decode_eval
from tests.small_sets import jpeg

HAS_DALI = (
    importlib.util.find_spec("nvidia") is not None
    and importlib.util.find_spec("nvidia.dali") is not None
)
needs_dali = pytest.mark.skipif(not HAS_DALI, reason="DALI has no wheel here")
CPU = torch.device("cpu")
DATA = Data(train="t", val="v", batch_size=8)


def sizes_of(encoded: list[bytes]) -> dict[str, np.ndarray]:
    sizes = np.array([Image.open(io.BytesIO(data)).size for data in encoded])
    return {"heights": sizes[:, 1], "widths": sizes[:, 0]}


def windows(encoded: list[bytes], *, train: bool, img_size: int) -> Geometry:
    if not train:
        return center_crop(**sizes_of(encoded), img_size=img_size, crop_pct=0.875)
    return random_resized_crop(
        np.arange(len(encoded)),
        **sizes_of(encoded),
        seed=1,
        epoch=1,
        img_size=img_size,
        scale=(0.08, 1.0),
        ratio=(3 / 4, 4 / 3),
        hflip=0.5,
    )


def taken(geometry: Geometry, rows: np.ndarray) -> Geometry:
    return Geometry(**{name: value[rows] for name, value in vars(geometry).items()})


def decoder_of(
    kind: Any,
    *,
    interpolation: Interpolation = "bicubic",
    img_size: int = 64,
    batch_size: int = 64,
    num_threads: int = 1,
) -> Any:
    data = dataclasses.replace(
        DATA,
        decoder=kind,
        train_interpolation=interpolation,
        num_decode_threads=num_threads,
    )
    return make_decoder(
        data, img_size=img_size, batch_size=batch_size, train=True, device=CPU
    )


def levels(images: Tensor) -> Tensor:
    """Undo the normalisation: pixels from 0 to 255."""
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (DATA.mean, DATA.std))
    return (images * std + mean) * 255


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    folder = tmp_path_factory.mktemp("photographs")
    paths: list[Path] = cut_photographs(folder, num_images=24, seed=5)
    return [path.read_bytes() for path in paths]


@needs_dali
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("train", [True, False])
def test_dali_and_pillow_agree_on_photographs(
    photographs: list[bytes], interpolation: Interpolation, train: bool
) -> None:
    geometry = windows(photographs, train=train, img_size=224)
    images = [
        decoder_of(kind, interpolation=interpolation, img_size=224)(
            photographs, geometry
        )
        for kind in ("dali", "torch")
    ]
    for tensor in images:
        assert tensor.shape == (24, 3, 224, 224)
        assert tensor.dtype == torch.float32
        assert tensor.is_contiguous(memory_format=torch.channels_last)
    # Both decode JPEG alike to the bit. They resize with the same kernels, Pillow in
    # fixed point with a rounding between the two passes, DALI in floats with one at
    # the end: a level apart here and there, more where bicubic overshoots an edge.
    apart = (levels(images[0]) - levels(images[1])).abs()
    assert apart.mean() < 0.3
    assert (apart > 1.01).float().mean() < 0.001
    assert apart.max() < 16


@needs_dali
def test_dali_and_pillow_agree_on_small_images() -> None:
    encoded = [jpeg(i, size=(28, 28)) for i in range(32)]
    for train in (True, False):
        geometry = windows(encoded, train=train, img_size=32)
        found = [
            decoder_of(k, img_size=32)(encoded, geometry) for k in ("dali", "torch")
        ]
        apart = (levels(found[0]) - levels(found[1])).abs()
        assert apart.mean() < 0.5
        assert apart.max() < 16  # small pictures are all edges


@needs_dali
@pytest.mark.parametrize("sides", [(97, 64), (64, 97), (71, 73), (300, 65), (64, 64)])
def test_evaluation_crops_lie_where_pillows_do(sides: tuple[int, int]) -> None:
    # A ramp of a level a pixel: a corner that is one off would differ everywhere.
    height, width = sides
    ramp = np.stack(
        np.broadcast_arrays(
            np.arange(height)[:, None] % 256,
            np.arange(width)[None] % 256,
            np.full((1, 1), 99),
        ),
        axis=2,
    ).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(ramp).save(buffer, "PNG")
    geometry = center_crop(
        heights=np.array([height]),
        widths=np.array([width]),
        img_size=56,
        crop_pct=0.875,
    )
    ours, pillows = (
        levels(decoder_of(kind, img_size=56)([buffer.getvalue()], geometry))
        for kind in ("dali", "torch")
    )
    assert (ours - pillows).abs().median() < 0.3


def encode(image: Image.Image, kind: str, **settings: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **settings)
    return buffer.getvalue()


def odd_images() -> dict[str, bytes]:
    color = Image.open(io.BytesIO(jpeg(3, size=(80, 60)))).convert("RGB")
    images = {
        "grey JPEG": encode(color.convert("L"), "JPEG"),
        "CMYK JPEG": encode(color.convert("CMYK"), "JPEG"),
        "progressive JPEG": encode(color, "JPEG", progressive=True),
        "PNG": encode(color, "PNG"),
        "palette PNG": encode(color.convert("P"), "PNG"),
        "grey PNG": encode(color.convert("L"), "PNG"),
    }
    for orientation in (2, 3, 6, 8):
        exif = Image.Exif()
        exif[0x0112] = orientation
        images[f"EXIF {orientation}"] = encode(color, "JPEG", exif=exif)
    return images


@needs_dali
@pytest.mark.parametrize("name", odd_images())
def test_odd_formats_decode_alike(name: str) -> None:
    encoded = [odd_images()[name]] * 2
    for train in (True, False):
        geometry = windows(encoded, train=train, img_size=32)
        ours, pillows = (
            levels(decoder_of(kind, img_size=32)(encoded, geometry))
            for kind in ("dali", "torch")
        )
        assert ours.std() > 10
        assert (ours - pillows).abs().mean() < 1


@pytest.mark.parametrize("kind", ["torch", pytest.param("dali", marks=needs_dali)])
@pytest.mark.parametrize("orientation", [2, 3, 6, 8])
def test_no_image_is_rotated_by_its_exif(kind: str, orientation: int) -> None:
    plain = Image.open(io.BytesIO(jpeg(3, size=(80, 60))))
    exif = Image.Exif()
    exif[0x0112] = orientation
    pair = [encode(plain, "JPEG"), encode(plain, "JPEG", exif=exif)]
    images = decoder_of(kind)(pair, windows(pair, train=False, img_size=64))
    assert torch.equal(images[0], images[1])


@pytest.mark.parametrize("kind", ["torch", pytest.param("dali", marks=needs_dali)])
def test_pixels_do_not_depend_on_order_batch_or_threads(
    photographs: list[bytes], kind: str
) -> None:
    geometry = windows(photographs, train=True, img_size=64)
    whole = decoder_of(kind)(photographs, geometry)
    order = np.random.default_rng(0).permutation(len(photographs))
    for batch_size, num_threads in ((7, 2), (5, 1)):
        decode = decoder_of(kind, batch_size=batch_size, num_threads=num_threads)
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            images = decode([photographs[i] for i in rows], taken(geometry, rows))
            assert torch.equal(images, whole[torch.from_numpy(rows)])


@pytest.mark.parametrize("kind", ["torch", pytest.param("dali", marks=needs_dali)])
def test_a_flip_mirrors_and_a_batch_outlives_the_next(kind: str) -> None:
    encoded = [jpeg(1, size=(40, 40))] * 2
    geometry = windows(encoded, train=False, img_size=64)
    flipped = dataclasses.replace(geometry, flip=np.array([False, True]))
    decode = decoder_of(kind)
    first = decode(encoded, flipped)
    assert torch.equal(first[0].flip(-1), first[1])
    kept = first.clone()
    for number in range(4):
        decode([jpeg(number, size=(40, 40))] * 2, geometry)
    assert torch.equal(first, kept)


def test_normalisation_is_by_the_settings() -> None:
    white = encode(Image.new("RGB", (32, 32), (255, 128, 0)), "PNG")
    data = dataclasses.replace(DATA, mean=(0.5, 0.5, 0.0), std=(0.5, 0.25, 2.0))
    image = decode_eval([white], data=data, img_size=16)
    wanted = torch.tensor([1.0, (128 / 255 - 0.5) / 0.25, 0.0]).view(1, 3, 1, 1)
    torch.testing.assert_close(image, wanted.expand(1, 3, 16, 16), rtol=0, atol=1e-5)


def test_decode_eval_is_the_evaluation_of_the_run(photographs: list[bytes]) -> None:
    decode = TorchDecoder(
        img_size=64,
        mean=DATA.mean,
        std=DATA.std,
        interpolation=DATA.eval_interpolation,
        device=CPU,
    )
    wanted = decode(photographs, windows(photographs, train=False, img_size=64))
    assert torch.equal(decode_eval(photographs, data=DATA, img_size=64), wanted)
