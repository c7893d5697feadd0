"""Load images as training does, and with DALI alone, DataLoaders, Ray Data.

Each function yields batches indefinitely, with `num_threads` threads or processes.
None of them shuffles less than its documentation advises, and none caches pixels.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch.utils.data import DataLoader, RandomSampler
from torchvision.datasets import ImageFolder

from benchmarks.sets import labelled_images
from benchmarks.work import TIMM_POLICY, Batches, Loaded, Pixels, Transform, Work
from pipelines.config import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Augment,
    Data,
    Model,
    Optim,
    Run,
    Scale,
)
from pipelines.data.batch import Position
from pipelines.data.epoch_plan import Unit
from pipelines.data.loader import Loader, reading_of
from pipelines.data.reading import Reading
from pipelines.data.shard_set import read_shard_set
from pipelines.worker.ray_source import shares, split_units

# More epochs than a round can see; datasets are opened a thousand units at a time.
_NUM_EPOCHS = 100_000
# Samples that a loader without random access shuffles among each other.
_BUFFER = 1024


class LocalSplit:
    """Opener of datasets for a single worker, on an existing Ray."""

    def __init__(self, reading: Reading, *, data: Data) -> None:
        self._reading = reading
        self._data = data
        self._plan: Callable[[], list[Unit]] = list

    def prepare(self, plan: Callable[[], list[Unit]]) -> None:
        """Keep the plan until the units are opened."""
        self._plan = plan

    def open(self) -> Iterator[pa.Table]:
        """Start a dataset and iterate over its tables."""
        (iterator,) = split_units(self._plan(), reading=self._reading, data=self._data)
        return shares(iterator, data=self._data)


def ours(work: Work, *, num_epochs: int = _NUM_EPOCHS) -> Batches:
    """Load shards as one worker of a training does, without Ray Train.

    Raises ValueError if the last batch would be padded: padding rows are not decoded
    images.
    """
    if work.num_images % work.batch_size:
        raise ValueError(
            f"expected a multiple of {work.batch_size} images, got {work.num_images}; "
            "set --num-images"
        )
    run = describe_run(work, num_epochs=num_epochs)
    shards = read_shard_set(run.data.train)
    reading = reading_of(shards, run=run, train=True)
    loader = Loader(
        shards,
        run=run,
        train=True,
        start=Position(),
        opener=LocalSplit(reading, data=run.data),
        device=torch.device(work.device),
    )
    loader.start()
    with contextlib.closing(loader):
        for batch in loader:
            yield batch.images, batch.labels


def describe_run(work: Work, *, num_epochs: int) -> Run:
    """Build a run that reads the work's shards the way all loaders do."""
    shards = str(work.folder / "shards")
    return Run(
        recipe="benchmark",
        model=Model(name="so_vit_7", img_size=work.img_size),
        data=Data(
            train=shards,
            val=shards,
            batch_size=work.batch_size,
            num_decode_threads=work.num_threads,
        ),
        augment=Augment(
            crop_scale=work.scale,
            crop_ratio=work.ratio,
            hflip=work.hflip,
            interpolation="bilinear",
            auto_augment=TIMM_POLICY if work.rand_augment else "",
        ),
        optim=Optim(lr=1e-4, num_epochs=num_epochs, warmup_epochs=0),
        # All loaders give float32; a training on a GPU may take bfloat16.
        scale=Scale(amp="off"),
    )


def dali_files(work: Work) -> Batches:
    """Load with DALI's own reader of files and its own random numbers.

    What a user of DALI alone would have: the limit for everything that feeds DALI.
    """
    pipeline = _dali_pipeline(work)
    pipeline.build()
    # On a GPU the batch must be whole for those who read it on torch's stream.
    stream = torch.cuda.current_stream() if work.device == "cuda" else None
    while True:
        # Positional only: by name DALI takes it for one more input of the graph.
        images, labels = pipeline.run(stream)
        yield (
            torch.from_dlpack(images.as_tensor()),
            torch.from_dlpack(labels.as_tensor()).view(-1),
        )


def _dali_pipeline(work: Work) -> Any:
    fn, types, dali, auto = (
        importlib.import_module(f"nvidia.dali{module}")
        for module in (".fn", ".types", "", ".auto_aug.rand_augment")
    )
    on_gpu = work.device == "cuda"
    files, labels = zip(*labelled_images(work.folder / "images"), strict=True)

    def define() -> tuple[Any, Any]:
        encoded, label = fn.readers.file(
            files=[str(path) for path in files],
            labels=list(labels),
            random_shuffle=True,
            initial_fill=_BUFFER,
        )
        images = fn.decoders.image_random_crop(
            encoded,
            device="mixed" if on_gpu else "cpu",
            random_area=list(work.scale),
            random_aspect_ratio=list(work.ratio),
            num_attempts=10,
        )
        images = fn.resize(
            images,
            size=[work.img_size, work.img_size],
            interp_type=types.INTERP_LINEAR,
            antialias=True,
        )
        if work.rand_augment:
            images = auto.rand_augment(images, n=2, m=9)
        images = fn.crop_mirror_normalize(
            images,
            mirror=fn.random.coin_flip(probability=work.hflip),
            mean=[255 * value for value in IMAGENET_MEAN],
            std=[255 * value for value in IMAGENET_STD],
            dtype=types.FLOAT,
            output_layout="CHW",
        )
        return images, label

    make = dali.pipeline_def(
        define,
        batch_size=work.batch_size,
        num_threads=work.num_threads,
        device_id=0 if on_gpu else None,
        enable_conditionals=work.rand_augment,
    )
    return make()


def torchvision_files(work: Work, *, pixels: Pixels) -> Batches:
    """Load a folder of images with torchvision and a DataLoader's processes."""
    dataset = ImageFolder(
        str(work.folder / "images"),
        transform=Transform(work, pixels=pixels),
        loader=_read_file,
    )
    num_samples = len(dataset) * work.num_repeats
    loader = _data_loader(
        dataset, work=work, sampler=RandomSampler(dataset, num_samples=num_samples)
    )
    return _endless(loader)


def mosaic_streaming(work: Work) -> Batches:
    """Load MosaicML Streaming's MDS from the local disk, decode with torchvision."""
    streaming: Any = importlib.import_module("streaming")
    transform = Transform(work, pixels="tensor")
    dataset = streaming.StreamingDataset(
        local=str(work.folder / "mds"),
        shuffle=True,
        batch_size=work.batch_size,
        epoch_size=work.num_images * work.num_repeats,
    )
    loader = _data_loader(dataset, work=work, collate_fn=transform.collate)
    return _endless(loader)


def webdataset_tars(work: Work) -> Batches:
    """Load WebDataset's tars, dealt out to processes, and decode with torchvision."""
    webdataset: Any = importlib.import_module("webdataset")
    transform = Transform(work, pixels="tensor")
    tars = sorted(str(path) for path in (work.folder / "tars").glob("*.tar"))
    dataset = (
        webdataset.WebDataset(tars, shardshuffle=len(tars))
        .repeat()
        .shuffle(_BUFFER)
        .rename(image="jpg", label="cls")
    )
    loader = _data_loader(dataset, work=work, collate_fn=transform.collate)
    return _endless(loader)


def ray_data(work: Work) -> Batches:
    """Load Parquet with Ray Data as its guides show: decode in tasks, send tensors.

    With the settings of one who knows it: the reader that starts without actors of its
    own, two columns, files in random order, as many tasks as threads.
    """
    ray: Any = importlib.import_module("ray")
    context = ray.data.DataContext.get_current()
    context.use_datasource_v2 = False
    context.enable_progress_bars = False
    paths = sorted(str(path) for path in (work.folder / "shards").glob("*.parquet"))
    transform = Transform(work, pixels="tensor")
    while True:
        dataset = ray.data.read_parquet(
            paths * work.num_repeats, columns=["image", "label"], shuffle="files"
        ).map_batches(
            functools.partial(_decode_block, transform=transform),
            batch_size=work.batch_size,
            compute=ray.data.TaskPoolStrategy(size=work.num_threads),
        )
        for batch in dataset.iter_torch_batches(
            batch_size=work.batch_size, prefetch_batches=2, drop_last=True, device="cpu"
        ):
            yield batch["image"], batch["label"]


def _decode_block(
    block: dict[str, np.ndarray], *, transform: Transform
) -> dict[str, np.ndarray]:
    images = transform.stack(block["image"].tolist())
    return {"image": images.numpy(), "label": block["label"]}


def _read_file(path: str) -> bytes:
    return Path(path).read_bytes()


def _data_loader(dataset: Any, *, work: Work, **settings: Any) -> DataLoader[Any]:
    has_processes = work.num_threads > 0
    return DataLoader(
        dataset,
        batch_size=work.batch_size,
        num_workers=work.num_threads,
        drop_last=True,
        persistent_workers=has_processes,
        # The default on Linux, which a process of the benchmark itself does not have.
        multiprocessing_context="fork" if has_processes else None,
        pin_memory=work.device == "cuda",
        **settings,
    )


def _endless(loader: Iterable[Loaded]) -> Batches:
    yield from itertools.chain.from_iterable(itertools.repeat(loader))
