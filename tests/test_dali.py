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
from pipelines.config import Augment, Data, Interpolation, PixelSettings
from pipelines.transforms.cpu import HostDecoder
from pipelines.transforms.crops import center_crop, random_resized_crop
from pipelines.transforms.decoder import decode_eval, make_decoder
from pipelines.transforms.pillow_decode import pillow_windows
from pipelines.transforms.sampling import Draws
from tests.small_sets import jpeg

HAS_DALI = (
    importlib.util.find_spec("nvidia") is not None
    and importlib.util.find_spec("nvidia.dali") is not None
)
needs_dali = pytest.mark.skipif(not HAS_DALI, reason="DALI has no wheel here")
# graph is what a GPU runs, on DALI's CPU backend.
KINDS = [
    "torch",
    pytest.param("dali", marks=needs_dali),
    pytest.param("graph", marks=needs_dali),
]
CPU = torch.device("cpu")
DATA = Data(train="t", val="v", batch_size=8)


def sizes_of(encoded: list[bytes]) -> dict[str, np.ndarray]:
    sizes = np.array([Image.open(io.BytesIO(data)).size for data in encoded])
    return {"heights": sizes[:, 1], "widths": sizes[:, 0]}


def draws_for(
    encoded: list[bytes],
    *,
    train: bool,
    img_size: int,
    interpolation: Interpolation = "bicubic",
) -> Draws:
    given: dict[str, Any] = {"img_size": img_size, "interpolation": interpolation}
    if train:
        geometry = random_resized_crop(
            np.arange(len(encoded)),
            **sizes_of(encoded),
            seed=1,
            epoch=1,
            scale=(0.08, 1.0),
            ratio=(3 / 4, 4 / 3),
            hflip=0.5,
            **given,
        )
    else:
        geometry = center_crop(**sizes_of(encoded), crop_pct=0.875, **given)
    return Draws(geometry=geometry, ops=None, boxes=None)


def decoder_of(
    kind: Any, *, img_size: int = 64, batch_size: int = 64, num_threads: int = 1
) -> Any:
    data = dataclasses.replace(
        DATA,
        decoder="torch" if kind == "torch" else "dali",
        num_decode_threads=num_threads,
    )
    settings = PixelSettings(
        data=data, augment=Augment(), img_size=img_size, seed=0, train=True
    )
    if kind == "graph":
        from pipelines.transforms.dali import DaliDecoder

        decode: Any = DaliDecoder(settings, batch_size=batch_size, device=CPU)
    else:
        decode = make_decoder(settings, batch_size=batch_size, device=CPU)
    return lambda encoded, draws: decode(
        [np.frombuffer(data, np.uint8) for data in encoded], draws
    )


def pillow_pixels(data: bytes, draws: Draws, at: int, *, img_size: int) -> np.ndarray:
    """Do what is wanted with Pillow alone."""
    geometry = draws.geometry
    kinds = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)
    top, left = geometry.start[at].tolist()
    height, width = geometry.window[at].tolist()
    new_height, new_width = geometry.resized[at].tolist()
    image = Image.open(io.BytesIO(data)).convert("RGB")
    image = image.crop((left, top, left + width, top + height))
    image = image.resize((new_width, new_height), kinds[int(geometry.bicubic[at])])
    top, left = geometry.crop[at].tolist()
    pixels = np.asarray(image.crop((left, top, left + img_size, top + img_size)))
    return pixels[:, ::-1] if geometry.flip[at] else pixels


def apart(found: Tensor, wanted: Tensor | np.ndarray) -> Tensor:
    """Give the distance of pixels in levels."""
    return (found.float() - torch.as_tensor(np.array(wanted)).float()).abs()


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    folder = tmp_path_factory.mktemp("photographs")
    paths: list[Path] = cut_photographs(folder, num_images=24, seed=5)
    return [path.read_bytes() for path in paths]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("train", [True, False])
def test_pixels_are_pillows(
    photographs: list[bytes], kind: str, interpolation: Interpolation, train: bool
) -> None:
    draws = draws_for(
        photographs, train=train, img_size=224, interpolation=interpolation
    )
    found = decoder_of(kind, img_size=224)(photographs, draws)
    assert found.shape == (24, 224, 224, 3)
    assert found.dtype == torch.uint8
    wanted = [
        pillow_pixels(data, draws, at, img_size=224)
        for at, data in enumerate(photographs)
    ]
    distance = apart(found, np.stack(wanted))
    if kind == "graph":
        # The same kernels, Pillow's in fixed point with a rounding between the two
        # passes, DALI's in floats with one at the end: a level apart here and there,
        # more where bicubic overshoots an edge.
        assert distance.mean() < 0.3
        assert (distance > 1.01).float().mean() < 0.001
        assert distance.max() < 16
    else:
        # torch's fixed point has other widths than Pillow's; where bicubic overshoots
        # an edge, the two cut off at another place.
        assert distance.mean() < 0.1
        assert (distance > 1).float().mean() < 0.0001
        assert distance.max() <= (10 if interpolation == "bicubic" else 2)


@needs_dali
@pytest.mark.parametrize("train", [True, False])
def test_on_the_cpu_dali_and_pillow_give_the_same_pixels(
    photographs: list[bytes], train: bool
) -> None:
    draws = draws_for(photographs, train=train, img_size=96)
    found = [
        decoder_of(kind, img_size=96)(photographs, draws) for kind in ("dali", "torch")
    ]
    assert torch.equal(*found)


@pytest.mark.parametrize("kind", KINDS)
def test_small_images_grow_as_pillows(kind: str) -> None:
    encoded = [jpeg(i, size=(28, 28)) for i in range(32)]
    for train in (True, False):
        draws = draws_for(encoded, train=train, img_size=32)
        found = decoder_of(kind, img_size=32)(encoded, draws)
        wanted = [
            pillow_pixels(data, draws, at, img_size=32)
            for at, data in enumerate(encoded)
        ]
        distance = apart(found, np.stack(wanted))
        assert distance.mean() < 0.5
        assert distance.max() < 16  # small pictures are all edges


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sides", [(97, 64), (64, 97), (71, 73), (300, 65), (64, 64)])
def test_evaluation_crops_lie_where_pillows_do(
    kind: str, sides: tuple[int, int]
) -> None:
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
    encoded = [encode(Image.fromarray(ramp), "PNG")]
    draws = draws_for(encoded, train=False, img_size=56)
    found = decoder_of(kind, img_size=56)(encoded, draws)
    wanted = pillow_pixels(encoded[0], draws, 0, img_size=56)
    assert apart(found[0], wanted).median() < 0.3


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


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", odd_images())
def test_odd_formats_decode_alike(kind: str, name: str) -> None:
    encoded = [odd_images()[name]] * 2
    for train in (True, False):
        draws = draws_for(encoded, train=train, img_size=32)
        found = decoder_of(kind, img_size=32)(encoded, draws)
        wanted = pillow_pixels(encoded[0], draws, 0, img_size=32)
        assert found.float().std() > 2
        assert apart(found[0], wanted).mean() < 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("orientation", [2, 3, 6, 8])
def test_no_image_is_rotated_by_its_exif(kind: str, orientation: int) -> None:
    plain = Image.open(io.BytesIO(jpeg(3, size=(80, 60))))
    exif = Image.Exif()
    exif[0x0112] = orientation
    pair = [encode(plain, "JPEG"), encode(plain, "JPEG", exif=exif)]
    images = decoder_of(kind)(pair, draws_for(pair, train=False, img_size=64))
    assert torch.equal(images[0], images[1])


@pytest.mark.parametrize("kind", KINDS)
def test_pixels_do_not_depend_on_order_batch_or_threads(
    photographs: list[bytes], kind: str
) -> None:
    draws = draws_for(photographs, train=True, img_size=64)
    whole = decoder_of(kind)(photographs, draws)
    order = np.random.default_rng(0).permutation(len(photographs)).tolist()
    for batch_size, num_threads in ((7, 2), (5, 1)):
        decode = decoder_of(kind, batch_size=batch_size, num_threads=num_threads)
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            images = decode([photographs[i] for i in rows], draws.take(rows))
            assert torch.equal(images, whole[rows])


@pytest.mark.parametrize("kind", KINDS)
def test_a_flip_mirrors_and_a_batch_outlives_the_next(kind: str) -> None:
    encoded = [jpeg(1, size=(40, 40))] * 2
    draws = draws_for(encoded, train=False, img_size=64)
    geometry = dataclasses.replace(draws.geometry, flip=np.array([False, True]))
    decode = decoder_of(kind)
    first = decode(encoded, dataclasses.replace(draws, geometry=geometry))
    assert torch.equal(first[0].flip(1), first[1])
    kept = first.clone()
    for number in range(4):
        decode([jpeg(number, size=(40, 40))] * 2, draws)
    assert torch.equal(first, kept)


def test_normalisation_is_by_the_settings() -> None:
    white = encode(Image.new("RGB", (32, 32), (255, 128, 0)), "PNG")
    data = dataclasses.replace(DATA, mean=(0.5, 0.5, 0.0), std=(0.5, 0.25, 2.0))
    image = decode_eval([white], data=data, img_size=16)
    wanted = torch.tensor([1.0, (128 / 255 - 0.5) / 0.25, 0.0]).view(1, 3, 1, 1)
    torch.testing.assert_close(image, wanted.expand(1, 3, 16, 16), rtol=0, atol=1e-5)


def test_decode_eval_is_the_evaluation_of_the_run(photographs: list[bytes]) -> None:
    decode = HostDecoder(pillow_windows, img_size=64, fill=(0, 0, 0), num_threads=1)
    views = [np.frombuffer(data, np.uint8) for data in photographs]
    pixels = decode(views, draws_for(photographs, train=False, img_size=64))
    mean, std = (torch.tensor(value) for value in (DATA.mean, DATA.std))
    wanted = ((pixels / 255 - mean) / std).permute(0, 3, 1, 2)
    found = decode_eval(photographs, data=DATA, img_size=64)
    assert found.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
