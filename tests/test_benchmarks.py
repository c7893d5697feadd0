"""Benchmarks: every loader does the same work on the same images, and time adds up."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import os
import subprocess
import sys
from collections import Counter
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

from benchmarks import frame, ingest
from benchmarks.frame import Moments, check_batches, reference_moments
from benchmarks.loaders import ours
from benchmarks.sets import (
    Sets,
    labelled_images,
    unpack_shards,
    write_mds,
    write_shards,
    write_tars,
)
from benchmarks.timing import Round
from benchmarks.work import Loaded, Loader, Pixels, Policy, Transform, Work
from pipelines.config import IMAGENET_MEAN, IMAGENET_STD
from tests.test_benchmark_rounds import a_round

NUM_IMAGES, NUM_CLASSES = 16, 4
WIDTH, HEIGHT = 96, 64
NUM_BATCHES, BATCH_SIZE, IMG_SIZE = 32, 8, 32
LOADERS = {loader.name: loader for loader in ingest.line_up(rand_augment=False)}
POLICIES: list[tuple[Pixels, Policy]] = [
    ("tensor", "torchvision"),
    ("pil", "timm"),
    ("pil", "torchvision"),
]


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
    write_shards(folder)
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


def taken(loader: Loader, work: Work, *, num_batches: int) -> list[Loaded]:
    """Take some batches of a loader, or skip where it is not installed."""
    for name in loader.libraries:
        pytest.importorskip(name, reason="needs the extra 'bench'")
    with contextlib.closing(loader.batches(work)) as batches:
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


@pytest.mark.parametrize(
    "name", [name for name, loader in LOADERS.items() if not loader.on_ray]
)
def test_loaders_do_the_same_work(name: str, work: Work) -> None:
    if name != "dali-files":
        # In this process: forking one in which Ray may run is asking for trouble.
        work = replace(work, num_threads=0)
    batches = taken(LOADERS[name], work, num_batches=NUM_BATCHES)
    check_batches(batches, work=work, reference=reference_moments(work))
    check_same_work(batches, work=work)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
@pytest.mark.parametrize(
    "name", [name for name, loader in LOADERS.items() if loader.on_ray]
)
def test_loaders_on_ray_do_the_same_work(name: str, work: Work) -> None:
    loader = LOADERS[name]
    if name == ingest.OURS:
        # As many epochs as are looked at: Ray takes seconds to list a thousand.
        few = functools.partial(ours, num_epochs=NUM_BATCHES * BATCH_SIZE // NUM_IMAGES)
        loader = replace(loader, batches=few)
    batches = taken(loader, work, num_batches=NUM_BATCHES)
    check_batches(batches, work=work, reference=reference_moments(work))
    check_same_work(batches, work=work)


@pytest.mark.parametrize(("pixels", "policy"), POLICIES)
def test_rand_augment_is_on_where_it_is_asked_for(
    pixels: Pixels, policy: Policy, work: Work
) -> None:
    path, _ = next(labelled_images(work.folder / "images"))
    # The whole image, so that nothing else is random.
    plain = {"scale": (1.0, 1.0), "ratio": (1.5, 1.5), "hflip": 0.0}
    for rand_augment in (False, True):
        whole = replace(work, **plain, rand_augment=rand_augment)
        transform = Transform(whole, pixels=pixels, policy=policy)
        images = transform.stack([path.read_bytes()] * 16)
        assert images.dtype == torch.float32
        assert (len(images.unique(dim=0)) > 1) == rand_augment


def test_dali_augments_where_it_is_asked_to(work: Work) -> None:
    augmented = replace(work, rand_augment=True)
    batches = taken(LOADERS["dali-files"], augmented, num_batches=8)
    green = torch.cat([images[:, 1] for images, _ in batches])
    # Without it an image's green is all the same.
    assert green.std(dim=(1, 2)).median() > 0.05


def test_ours_refuses_a_batch_that_would_be_filled_up(work: Work) -> None:
    odd = replace(work, num_images=NUM_IMAGES + 1)
    with pytest.raises(ValueError, match="multiple of 8"):
        next(LOADERS["ours"].batches(odd))


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


def refused(batch: Loaded, *, work: Work, reference: Moments) -> str:
    with pytest.raises(ValueError, match="expected") as caught:
        check_batches([batch], work=work, reference=reference)
    return str(caught.value)


def test_what_is_less_than_the_work_is_refused(work: Work) -> None:
    generator = torch.Generator().manual_seed(0)
    shape = (BATCH_SIZE, 3, IMG_SIZE, IMG_SIZE)
    images = torch.randn(shape, generator=generator)
    images += torch.randn((BATCH_SIZE, 3, 1, 1), generator=generator) / 10
    labels = torch.zeros(BATCH_SIZE, dtype=torch.int64)
    refuse = functools.partial(refused, work=work, reference=Moments(mean=0.0, std=1.0))
    check_batches([(images, labels)], work=work, reference=Moments(mean=0, std=1))
    assert "float16" in refuse((images.half(), labels))
    assert f"({BATCH_SIZE}, 3, 31, {IMG_SIZE})" in refuse((images[:, :, 1:], labels))
    assert "int32" in refuse((images, labels.int()))
    assert "pixels" in refuse((images * 60 + 120, labels))
    assert "pixels" in refuse((images * torch.nan, labels))
    assert "differ" in refuse((images[[0, *range(BATCH_SIZE - 1)]], labels))


def test_rounds_are_interleaved(monkeypatch: pytest.MonkeyPatch, work: Work) -> None:
    seen: list[str] = []

    def time_entry(entry: frame.Entry, **_: Any) -> Round:
        seen.append(entry.name)
        return a_round(100 * len(seen))

    monkeypatch.setattr(frame, "time_entry", time_entry)
    monkeypatch.setattr(frame, "run_alone", lambda function: function())
    loader = LOADERS["dali-files"]
    entries = [
        frame.Entry(
            name=name, loader=loader, work=work, reference=Moments(mean=0, std=1)
        )
        for name in ("ours", "other")
    ]
    rounds = frame.run_rounds(
        entries, num_rounds=3, warm_s=1, measure_s=1, on_round=lambda rounds: None
    )
    assert seen == ["ours", "other"] * 3
    assert [found.images_per_s for found in rounds["other"]] == [200, 400, 600]


def test_what_was_measured_is_there_when_a_loader_fails(
    monkeypatch: pytest.MonkeyPatch, work: Work, tmp_path: Path
) -> None:
    left = iter([a_round(100), a_round(200)])

    def run_alone(function: Any) -> Round:
        del function
        found = next(left, None)
        if found is None:
            raise ValueError("stopped here")
        return found

    monkeypatch.setattr(frame, "run_alone", run_alone)
    sets = Sets(original=work.folder, small=None)
    monkeypatch.setattr(ingest, "make_sets", lambda *args, **settings: sets)
    out = tmp_path / "result.json"
    loaders = "torchvision-tensor dali-files torchvision-pil"
    with pytest.raises(ValueError, match="stopped here"):
        ingest._main(f"--rounds 2 --json {out} --loaders {loaders}".split())
    content = json.loads(out.read_text())
    assert list(content["loaders"]) == ["torchvision-tensor", "dali-files"]
    assert content["missing"] == ["torchvision-pil"]


def test_a_round_has_a_process_of_its_own() -> None:
    process = frame.run_alone(os.getpid)
    assert process != os.getpid()
    assert not Path(f"/proc/{process}").exists()


def test_loaders_are_chosen_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    missing = Loader(
        name="missing", batches=LOADERS["ours"].batches, libraries=("no_such.part",)
    )
    loaders = [LOADERS["ours"], LOADERS["dali-files"], missing]
    choose = functools.partial(ingest.choose, loaders)
    assert choose(names=["dali-files"]) == [LOADERS["dali-files"]]
    assert choose(names=[]) == loaders[:2]
    assert "missing" in capsys.readouterr().err
    with pytest.raises(ValueError, match="ours, dali-files, missing"):
        choose(names=["dali"])
    with pytest.raises(ValueError, match=r"extra 'bench', got 'missing'"):
        choose(names=["missing"])


@pytest.mark.parametrize(
    "wrong", [{"num_images": 65}, {"num_images": 0}, {"num_threads": 0}]
)
def test_options_that_can_not_be_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="set --num-"):
        ingest.Options(**wrong)


def test_names_are_unique_and_ours_is_first() -> None:
    for rand_augment in (False, True):
        names = [loader.name for loader in ingest.line_up(rand_augment=rand_augment)]
        assert set(Counter(names).values()) == {1}
        assert names[0] == ingest.OURS


@pytest.mark.slow
def test_the_command_compares_and_writes(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Run it on real photographs, in processes with workers of their own."""
    written = tmp_path / "result.json"
    command = [sys.executable, "-m", "benchmarks.ingest", "--json", str(written)]
    command += ["--num-images", "64", "--rounds", "1", "--folder", str(tmp_path)]
    command += ["--round-s", "0.2", "--warm-s", "0.1"]
    command += ["--loaders", "torchvision-tensor"]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[1])
    result = json.loads(written.read_text())
    assert set(result["loaders"]) == {"torchvision-tensor"}
    assert result["original_images"]["num_images"] == 64
    assert result["original_images"]["mean_bytes"] > 50_000
    assert "torchvision-tensor" in capfd.readouterr().out
