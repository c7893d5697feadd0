"""Benchmarks: every loader does the same work on the same images, and time adds up."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from benchmarks import ingest
from benchmarks.ingest import LOADERS, ON_RAY, delivered
from benchmarks.loaders import ours
from benchmarks.sets import (
    labelled_images,
    unpack_shards,
    write_mds,
    write_shards,
    write_tars,
)
from benchmarks.work import Loaded, Pixels, Transform, Work
from pipelines.config import IMAGENET_MEAN, IMAGENET_STD

NUM_IMAGES, NUM_CLASSES = 16, 4
WIDTH, HEIGHT = 96, 64
NUM_BATCHES, BATCH_SIZE, IMG_SIZE = 32, 8, 32


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Work:
    """Write 16 images whose crops can be told: red tells where, green which image."""
    folder = tmp_path_factory.mktemp("benchmarks")
    across = np.linspace(0, 255, WIDTH)[None, :]
    down = np.linspace(0, 255, HEIGHT)[:, None]
    for number in range(NUM_IMAGES):
        pixels = np.zeros((HEIGHT, WIDTH, 3))
        pixels += np.stack(
            np.broadcast_arrays(across, float(15 * number), down), axis=-1
        )
        path = folder / "images" / f"c{number % NUM_CLASSES}" / f"{number:02d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(pixels.round().astype(np.uint8))
        image.save(path, quality=98, subsampling=0)
    write_shards(folder, images=folder / "images")
    if importlib.util.find_spec("streaming"):
        write_mds(folder / "images", folder / "mds")
    if importlib.util.find_spec("webdataset"):
        write_tars(folder / "images", folder / "tars")
    return Work(
        folder=folder,
        num_images=NUM_IMAGES,
        num_threads=1,
        batch_size=BATCH_SIZE,
        img_size=IMG_SIZE,
    )


def taken(name: str, work: Work, *, num_batches: int, **settings: int) -> list[Loaded]:
    """Take some batches of a loader, or skip where it is not installed."""
    if not ingest.is_installed(name):
        pytest.skip("needs the extra 'bench'")
    load = functools.partial(LOADERS[name], **settings)
    with contextlib.closing(delivered(load, work)) as batches:
        # Clones, since a loader may use a batch's memory again.
        return [
            (images.clone(), labels.clone())
            for images, labels in (next(batches) for _ in range(num_batches))
        ]


def slopes(channel: np.ndarray) -> np.ndarray:
    """Fit a line through each row of pixels; the border's resampling is left out."""
    inner = channel[:, 2:-2]
    places = np.arange(inner.shape[1]) - (inner.shape[1] - 1) / 2
    return inner @ places / (places @ places)


def check_same_work(batches: Sequence[Loaded], *, work: Work) -> None:
    """Read crops, flips and identities off the pixels."""
    shape = (work.batch_size, 3, work.img_size, work.img_size)
    for images, labels in batches:
        assert (images.dtype, tuple(images.shape)) == (torch.float32, shape)
        assert (labels.dtype, tuple(labels.shape)) == (torch.int64, shape[:1])
    images = torch.cat([images for images, _ in batches]).permute(0, 2, 3, 1).numpy()
    labels = torch.cat([labels for _, labels in batches]).numpy()
    pixels = 255 * (images * IMAGENET_STD + IMAGENET_MEAN)
    red, green, blue = np.moveaxis(pixels, -1, 0)
    numbers = np.rint(green.mean(axis=(1, 2)) / 15).astype(int)
    assert np.abs(green - 15 * numbers[:, None, None]).max() < 6
    assert set(numbers.tolist()) == set(range(NUM_IMAGES))
    assert (labels == numbers % NUM_CLASSES).all()
    across = slopes(red.mean(axis=1)) * work.img_size * (WIDTH - 1) / 255
    down = slopes(blue.mean(axis=2)) * work.img_size * (HEIGHT - 1) / 255
    widths, heights = np.abs(across), down
    assert 0.3 < (across < 0).mean() < 0.7
    area = widths * heights / (WIDTH * HEIGHT)
    assert work.scale[0] - 0.02 < area.min() < area.max() < work.scale[1] + 0.02
    # torchvision's draws, of which a mean of 256 is 0.015 off as a rule.
    assert abs(area.mean() - drawn_area(work)) < 0.08
    aspect = widths / heights
    assert work.ratio[0] - 0.06 < aspect.min() < 0.85
    assert 1.2 < aspect.max() < work.ratio[1] + 0.06


@functools.cache
def drawn_area(work: Work) -> float:
    image = torch.zeros(3, HEIGHT, WIDTH)
    draws = [
        v2.RandomResizedCrop(work.img_size, work.scale, work.ratio).make_params([image])
        for _ in range(3000)
    ]
    areas = [draw["height"] * draw["width"] for draw in draws]
    return float(np.mean(areas)) / (WIDTH * HEIGHT)


@pytest.mark.parametrize("name", [name for name in LOADERS if name not in ON_RAY])
def test_loaders_do_the_same_work(name: str, work: Work) -> None:
    if name != "dali-files":
        # In this process: forking one in which Ray may run is asking for trouble.
        work = replace(work, num_threads=0)
    check_same_work(taken(name, work, num_batches=NUM_BATCHES), work=work)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
@pytest.mark.parametrize("name", ON_RAY)
def test_loaders_on_ray_do_the_same_work(name: str, work: Work) -> None:
    # As many epochs as are looked at: Ray takes seconds to list a thousand.
    few = NUM_BATCHES * BATCH_SIZE // NUM_IMAGES
    settings = {"num_epochs": few} if name == "ours" else {}
    batches = taken(name, work, num_batches=NUM_BATCHES, **settings)
    check_same_work(batches, work=work)


@pytest.mark.parametrize("pixels", ["tensor", "pil"])
def test_rand_augment_is_on_where_it_is_asked_for(pixels: Pixels, work: Work) -> None:
    path, _ = next(labelled_images(work.folder / "images"))
    # The whole image, so that nothing else is random.
    plain = {"scale": (1.0, 1.0), "ratio": (1.5, 1.5), "hflip": 0.0}
    for rand_augment in (False, True):
        whole = replace(work, **plain, rand_augment=rand_augment)
        transform = Transform(whole, pixels=pixels)
        images = transform.stack([path.read_bytes()] * 16)
        assert images.dtype == torch.float32
        assert (len(images.unique(dim=0)) > 1) == rand_augment


def test_dali_augments_where_it_is_asked_to(work: Work) -> None:
    augmented = replace(work, rand_augment=True)
    batches = taken("dali-files", augmented, num_batches=8)
    green = torch.cat([images[:, 1] for images, _ in batches])
    # Without it an image's green is all the same.
    assert green.std(dim=(1, 2)).median() > 0.05


def test_ours_refuses_a_batch_that_would_be_filled_up(work: Work) -> None:
    odd = replace(work, num_images=NUM_IMAGES + 1)
    with pytest.raises(ValueError, match="multiple of 8"):
        next(ours(odd))


def test_sets_hold_the_same_bytes(work: Work, tmp_path: Path) -> None:
    wanted = {
        path.read_bytes(): label
        for path, label in labelled_images(work.folder / "images")
    }
    assert len(wanted) == NUM_IMAGES
    found: dict[bytes, int] = {}
    for path in (work.folder / "shards").glob("*.parquet"):
        rows = pq.read_table(path, columns=["image", "label"]).to_pylist()
        found |= {row["image"]: row["label"] for row in rows}
    assert found == wanted
    unpack_shards(work.folder / "shards", tmp_path)
    again = {path.read_bytes(): label for path, label in labelled_images(tmp_path)}
    assert again == wanted


def test_a_round_has_a_process_of_its_own() -> None:
    process = ingest.run_alone(os.getpid)
    assert process != os.getpid()
    assert not Path(f"/proc/{process}").exists()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"num_images": 65}, "set --num-images"),
        ({"num_images": 0}, "set --num-images"),
        ({"num_threads": 0}, "--num-threads"),
        ({"loaders": ("dali",)}, r"of \['ours', 'dali-files'.*got \['dali'\]"),
        ({"loaders": ("webdataset",)}, "install the extra 'bench'"),
    ],
)
def test_options_that_can_not_be_are_refused(
    wrong: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ingest, "is_installed", lambda name: name != "webdataset")
    with pytest.raises(ValueError, match=said):
        ingest.Options(**wrong)


@pytest.mark.slow
def test_the_command_compares_and_writes(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Run it on real photographs, in processes with workers of their own."""
    written = tmp_path / "result.json"
    command = [sys.executable, "-m", "benchmarks.ingest", "--json", str(written)]
    command += ["--num-images", "64", "--rounds", "1", "--folder", str(tmp_path)]
    command += ["--round-s", "0.2", "--warm-s", "0.1", "--short-side", "64"]
    command += ["--loaders", "torchvision-tensor"]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[1])
    (found,) = json.loads(written.read_text())["rounds"]
    assert found["case"] == "torchvision-tensor"
    assert found["images_per_s"] > 0 < found["images_per_cpu_s"]
    assert "torchvision-tensor" in capfd.readouterr().out
    sets = [tmp_path / f"photographs-64{side}" / "images" for side in ("", "-64")]
    sizes = [[it.stat().st_size for it, _ in labelled_images(of)] for of in sets]
    assert [len(of) for of in sizes] == [64, 64]
    assert np.mean(sizes[0]) > 50_000 > np.mean(sizes[1])
