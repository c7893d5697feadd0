"""Train as one worker: model, streams, checkpoints and what is told of them."""

from __future__ import annotations

import contextlib
import socket
import tempfile
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from timm.utils.model_ema import ModelEmaV3
from torch import nn

from pipelines import checkpoint as ckpt
from pipelines.checkpoint import Position
from pipelines.group import Group
from pipelines.ingest.batch import Batch
from pipelines.ingest.stream import Plans
from pipelines.initial import load_initial
from pipelines.job import Job
from pipelines.key_log import KeyLog
from pipelines.loop import (
    LoopSettings,
    TrainState,
    check_bad_share,
    evaluate,
    share_buffers,
    train,
)
from pipelines.memory import peak_memory_mb
from pipelines.optim import build_optimizer
from pipelines.probing import Prober
from pipelines.supply import Supply, reading_of
from pipelines.telling.bad_images import BadImageTeller
from pipelines.telling.bands import draw_bands
from pipelines.telling.board import Began, Event, Measured, Pictured


class Worker:
    """Hold one worker's model, streams and connections while it trains."""

    def __init__(self, job: Job, *, group: Group) -> None:
        run = job.run
        self.job, self.run, self.group, self.rank = job, run, group, group.rank
        self.device = group.device
        if self.device.type == "cpu":
            torch.set_num_threads(max(int(run.scale.cpus_per_worker), 1))
        epoch = Plans(shards=job.train_shards, run=run, train=True).shape(0)
        self.settings = LoopSettings(
            run=run,
            num_classes=len(job.train_shards.classes),
            steps_per_epoch=epoch.num_batches,
            images_per_epoch=epoch.num_images,
            device=self.device,
            world_size=group.world_size,
            rank=group.rank,
        )
        self.state = self._restore()
        # In the same order on every worker: opening is a collective.
        self.supplies = {split: self._supply(split) for split in ("train", "val")}
        self.prober = self._open_prober()
        self.key_log = self._open_key_log()
        self._last_log: dict[str, float] = {}

    def __enter__(self) -> Worker:
        for supply in self.supplies.values():
            supply.start()
        begun = Began(
            rank=self.rank,
            world_size=self.settings.world_size,
            host=socket.gethostname(),
            step=self.state.position.step,
        )
        self.group.post(begun)
        return self

    def __exit__(self, *_: object) -> None:
        for supply in self.supplies.values():
            supply.close()
        self.group.close()
        if self.key_log is not None:
            self.key_log.close()

    def train(self) -> None:
        """Train to the end of the run, or until the driver asks to end."""
        train(
            self.state,
            self.supplies["train"],
            settings=self.settings,
            on_log=self._log,
            on_epoch_end=self._end_epoch,
            on_checkpoint=self._keep,
            on_batch=self._note,
            on_step_begin=self._probe,
            is_ending=self.group.is_ending,
        )

    def _probe(self, state: TrainState, batch: Batch) -> None:
        if self.prober is not None:
            self.prober(state, batch)

    def _open_prober(self) -> Prober | None:
        if self.rank != 0 or not self.run.probe.every_steps:
            return None

        def log(metrics: Mapping[str, float], step: int) -> None:
            self.group.post(Measured(step=step, metrics=dict(metrics)))

        return Prober(self.state.model, settings=self.settings, on_probe=log)

    def _note(self, batch: Batch, step: int) -> None:
        if self.key_log is not None:
            self.key_log(batch, step)

    def _open_key_log(self) -> KeyLog | None:
        if not self.run.key_log:
            return None
        return KeyLog(
            Path(self.run.key_log),
            attempt=self.group.agreed(time.time_ns()),
            step=self.state.position.step,
            rank=self.rank,
            num_repeats=self.run.augment.num_repeats,
        )

    def _supply(self, split: str) -> Supply:
        job, run, is_train = self.job, self.run, split == "train"
        shards = job.train_shards if is_train else job.val_shards
        world_size = self.settings.world_size
        reading = reading_of(shards, run=run, train=is_train, num_workers=world_size)
        return Supply(
            shards,
            run=run,
            train=is_train,
            start=self.state.position,
            opener=self.group.opener(reading, data=run.data),
            device=self.device,
            rank=self.rank,
            world_size=world_size,
            on_bad=BadImageTeller(self.group.post, split=split, groups=shards.groups),
        )

    def _restore(self) -> TrainState:
        """Build the model; take weights and position from the checkpoint, if any."""
        run = self.run
        torch.manual_seed(run.seed)
        model = ckpt.build_model(run.model, num_classes=self.settings.num_classes)
        # Convolutions are faster so, on CPUs too, and decoders give their images so.
        model.to(self.device).to(memory_format=torch.channels_last)
        with self.group.latest() as folder:
            if folder is None and run.model.init_from:
                classes = self.job.train_shards.classes
                load_initial(model, run.model.init_from, classes=classes)
            decay = run.optim.ema_decay
            ema = ModelEmaV3(model, decay=decay) if decay else None
            optimizer = build_optimizer(model, optim=run.optim)
            position = Position()
            if folder is not None:
                position = ckpt.read_manifest(folder).position
                ckpt.load_weights(model, folder)
                if ema is not None:
                    ckpt.load_weights(ema.module, folder, ema=True)
                ckpt.load_optimizer(optimizer, folder)
        return TrainState(
            model=model,
            forward=self._wrap(model),
            optimizer=optimizer,
            ema=ema,
            position=position,
        )

    def _wrap(self, model: nn.Module) -> nn.Module:
        if self.settings.world_size == 1:
            return model
        on_gpu = self.device.type == "cuda"
        return nn.parallel.DistributedDataParallel(
            model,
            device_ids=[self.device.index] if on_gpu else None,
            gradient_as_bucket_view=True,
            # The papers keep BatchNorm's statistics by GPU; rank 0's are shared where
            # they are used, at the epoch's end.
            broadcast_buffers=False,
        )

    def _log(self, metrics: Mapping[str, float], position: Position) -> None:
        self._last_log = dict(metrics)
        if self.rank == 0:
            self._post(position)
            named = {f"train/{name}": value for name, value in metrics.items()}
            self.group.post(Measured(step=position.step, metrics=named))

    def _post(
        self, position: Position, *, held_out: Mapping[str, float] | None = None
    ) -> None:
        event = Event(
            step=position.step,
            epoch=position.epoch,
            metrics=self._last_log,
            epoch_metrics=held_out,
        )
        self.group.post(event)

    def _end_epoch(self, state: TrainState) -> None:
        """Evaluate, write a checkpoint and report."""
        model = state.ema.module if state.ema is not None else state.model
        # In the same order on every worker: these are collectives.
        share_buffers(state.model)
        if model is not state.model:
            share_buffers(model)
        held_out = evaluate(model, self.supplies["val"], settings=self.settings)
        num_bad = round(held_out.pop("num_bad"))
        expected = self.job.val_shards.groups.total_rows
        if held_out["num_images"] + num_bad != expected:
            raise ValueError(
                f"wanted each of the {expected} held-out images counted once, came "
                f"{held_out['num_images']:.0f} and {num_bad} that can't be decoded; "
                "the shards changed while they were read"
            )
        check_bad_share(
            num_bad, num_images=expected, max_share=self.run.data.max_bad_share
        )
        metrics = {f"val/{name}": value for name, value in held_out.items()}
        metrics["val/bad_images"] = num_bad
        metrics["train/peak_memory_mb"] = peak_memory_mb(self.device)
        metrics["epoch"] = state.position.epoch
        if self.prober is not None:
            metrics |= self.prober.summary()
        position = state.position
        if self.rank == 0:
            # Before the report, with which a sweep may end this run.
            self.group.post(Measured(step=position.step, metrics=metrics))
            self._post(position, held_out=held_out)
        self._report(state, name=f"epoch_{position.epoch:04d}", metrics=metrics)
        if self.prober is not None:
            title = f"{self.run.recipe}, to epoch {position.epoch}"
            draw = partial(draw_bands, tuple(self.prober.bands), title=title)
            path = f"probes/epoch_{position.epoch:04d}.png"
            self.group.post(Pictured(draw=draw, path=path))

    def _keep(self, state: TrainState) -> None:
        """Write a checkpoint within an epoch: nothing is evaluated."""
        self._report(state, name=f"step_{state.position.step:08d}", metrics={})

    def _report(
        self, state: TrainState, *, name: str, metrics: dict[str, float]
    ) -> None:
        """Write a checkpoint with what was measured last; a barrier of all workers."""
        start_s = time.perf_counter()
        trained = {f"train/{name}": value for name, value in self._last_log.items()}
        metrics = trained | metrics
        with contextlib.ExitStack() as stack:
            folder = None
            if self.rank == 0:
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
                ckpt.save_checkpoint(
                    folder,
                    run=self.run,
                    position=state.position,
                    classes=self.job.train_shards.classes,
                    metrics=metrics,
                    model=state.model,
                    ema=state.ema.module if state.ema is not None else None,
                    optimizer=state.optimizer,
                )
            self.group.report(metrics, folder=folder, name=name)
        if self.rank == 0:
            stall = {"train/checkpoint_s": time.perf_counter() - start_s}
            self.group.post(Measured(step=state.position.step, metrics=stall))
