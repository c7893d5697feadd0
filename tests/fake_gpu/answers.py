"""Run on the fake GPU what is no training step: supply, evaluate, predict, probe."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

from pipelines import predict
from pipelines.config import Probe, Run
from pipelines.data import loader, prefetch
from pipelines.data.loader import opened_here
from pipelines.data.shard_set import read_shard_set
from pipelines.evaluation import checkpoint
from pipelines.evaluation.held_out import HeldOut
from pipelines.export.images import Encoded
from pipelines.export.subject import Subject
from pipelines.training.model import build_model
from pipelines.worker.gradient_probe import Prober
from tests.fake_gpu.device import GPU
from tests.fake_gpu.steps import batch_of, fake_run, settings_of
from tests.fake_gpu.watch import Watch
from tests.small_sets import jpeg, write_set
from tests.token_sets import write_token_set
from tuning.heads.train import train_head

NUM_BATCHES = 2
"""Of a supply, an evaluation, and an epoch of a head."""
_ROWS = 4
_NUM_CLASSES = 3
_KWARGS = {"depth": 2}


class _Now:
    """Thread that does its work within `start`.

    A dispatch mode is thread-local, so the batches are made in our thread.
    """

    def __init__(self, *, target: Callable[..., None], args: Any, **_: Any) -> None:
        self._target, self._args = target, args

    def start(self) -> None:
        self._target(*self._args)

    def join(self, timeout: float | None = None) -> None:
        del timeout


def _really(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a host function to work on real tensors, outside the fake mode."""

    def called(*args: Any, **kwargs: Any) -> Any:
        with unset_fake_temporarily():
            found = function(*args, **kwargs)
            return list(found) if isinstance(found, Iterator) else found

    return called


@contextlib.contextmanager
def _small_shards() -> Iterator[str]:
    """Write a shard set, and read and decode it on the host within the context."""
    threads = SimpleNamespace(Thread=_Now, Event=threading.Event)
    tables = _really(loader.share_tables)
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(prefetch, "threading", threads),
        mock.patch.object(loader, "share_tables", tables),
    ):
        yield write_set(Path(folder, "set"), groups=[[NUM_BATCHES * _ROWS]])


def _decoded_run(address: str) -> Run:
    """Build a run whose readers decode, with all that a worker does to images."""
    run = fake_run("imagenet.so_vit_7", kwargs=_KWARGS)
    data = dataclasses.replace(
        run.data,
        train=address,
        val=address,
        batch_size=_ROWS,
        eval_batch_size=_ROWS,
        num_prefetch_batches=2 * NUM_BATCHES + 1,
        num_decode_threads=1,
        decode_on="readers",
        decoder="torch",
    )
    augment = dataclasses.replace(run.augment, re_prob=1.0)
    model = dataclasses.replace(run.model, img_size=64)
    optim = dataclasses.replace(run.optim, num_epochs=1, warmup_epochs=0)
    optim = dataclasses.replace(optim, cooldown_epochs=0)
    return dataclasses.replace(
        run, data=data, augment=augment, model=model, optim=optim
    )


def supply(watch: Watch) -> None:
    """Iterate over a training epoch's batches, from pixels that readers decoded."""
    with _small_shards() as address:
        run, shards = _decoded_run(address), read_shard_set(address)
        watch.on()
        with opened_here(shards, run=run, device=GPU, train=True) as batches:
            found = list(batches)
        watch.off()
    assert len(found) == NUM_BATCHES
    assert all(batch.images.device == GPU for batch in found)


def evaluate(watch: Watch) -> None:
    """Evaluate two models as sovit-eval does, with ReaL labels and some classes."""
    with _small_shards() as address:
        run, shards = _decoded_run(address), read_shard_set(address)
        num_rows = shards.groups.total_rows
        models = {
            name: build_model(run.model, num_classes=5) for name in ("average", "raw")
        }
        for model in models.values():
            model.to(GPU).to(memory_format=torch.channels_last)
        real = np.zeros((num_rows, 2), np.int32)
        names = tuple(f"c{at}" for at in range(_NUM_CLASSES))
        one = HeldOut(
            name="", shards=shards, classes=names, columns=(0, 2, 4), real=real
        )
        watch.on()
        # The sums that come home are zeros.
        with mock.patch.object(checkpoint, "check_counted"):
            checkpoint.measure_set(models, one, run=run, device=GPU)
        watch.off()


def answer(watch: Watch) -> None:
    """Classify images as sovit-predict does."""
    run = fake_run("imagenet.so_vit_7", kwargs=_KWARGS)
    subject = Subject(
        model=build_model(run.model, num_classes=_NUM_CLASSES).eval(),
        settings=run.model,
        data=run.data,
        classes=tuple(f"c{at}" for at in range(_NUM_CLASSES)),
        origin={},
    )
    images = [Encoded(name=str(at), content=jpeg(at)) for at in range(_ROWS)]
    subject.model.to(GPU)
    watch.on()
    with mock.patch.object(predict, "decode", _really(predict.decode)):
        found = list(predict.predict(subject, images, device=GPU))
    watch.off()
    assert [len(one.top) for one in found] == [_NUM_CLASSES] * _ROWS


def probe(watch: Watch) -> None:
    """Probe before a step."""
    run = fake_run("imagenet.so_vit_7", kwargs=_KWARGS)
    run = dataclasses.replace(run, probe=Probe(every_steps=1, num_step_sizes=2))
    model = build_model(run.model, num_classes=1000).to(GPU)
    prober = Prober(model, settings=settings_of(run))
    state = SimpleNamespace(model=model, position=SimpleNamespace(step=0))
    batch = batch_of(run)
    watch.on()
    found = prober(state, batch)  # pyright: ignore[reportArgumentType]
    watch.off()
    assert found


def head(watch: Watch) -> None:
    """Train a head on tokens for an epoch of two steps, and evaluate it."""
    run = fake_run("imagenet.so_vit_7", kwargs=_KWARGS)
    run = dataclasses.replace(
        run, optim=dataclasses.replace(run.optim, clip_grad_norm=1.0)
    )
    with tempfile.TemporaryDirectory() as folder:
        with unset_fake_temporarily():
            tokens = write_token_set(
                Path(folder, "set"),
                num_rows=NUM_BATCHES * _ROWS,
                shape=(197, 256),
                num_parts=1,
            )
        watch.on()
        train_head(
            run, tokens=tokens, val=tokens, num_epochs=1, seed=0, batch_size=_ROWS
        )
        watch.off()
