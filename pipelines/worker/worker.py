"""Train as one worker: model, streams, checkpoints and what is told of them."""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch

from pipelines.config.recipes import load_code
from pipelines.data.batch import Batch
from pipelines.data.loader import Loader, reading_of
from pipelines.data.position import Position
from pipelines.data.shard_set import ShardSet
from pipelines.data.stream import Plans
from pipelines.evaluation.image_keys import keys_of
from pipelines.evaluation.in_training import InTrainingEvaluator
from pipelines.events.bad_images import BadImageTeller
from pipelines.events.channel import Figure, Message, Metrics, Progress, WorkerStarted
from pipelines.hardware.device import PeakMemory, is_gpu
from pipelines.hardware.facts import worker_facts
from pipelines.training.gradient_probe import Prober
from pipelines.training.loop import (
    LoopSettings,
    TrainState,
    guard_of,
    share_buffers,
    train,
)
from pipelines.training.probe_figure import draw_bands
from pipelines.worker.audit_log import KeyLog
from pipelines.worker.checkpointing import Checkpointer
from pipelines.worker.group import Group
from pipelines.worker.job import Job
from pipelines.worker.watchdog import Watchdog


class Worker:
    """Hold one worker's model, streams and connections while it trains."""

    def __init__(self, job: Job, *, group: Group) -> None:
        run = job.run
        if job.code:
            load_code(job.code)
        self.job, self.run, self.group, self.rank = job, run, group, group.rank
        self.device = group.device
        if not is_gpu(self.device):
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
        self.keeper = Checkpointer(job, group=group)
        self.state = self.keeper.state()
        self.state.guard = guard_of(
            self.state,
            settings=self.settings,
            keys_of=partial(keys_of, job.train_shards),
        )
        # In the same order on every worker: opening is a collective.
        sets = () if run.validation.beside else job.held_out
        self.supplies = {"train": self._supply(job.train_shards, split="train")}
        for one in sets:
            self.supplies[one.prefix] = self._supply(one.shards, split=one.prefix)
        self.together = InTrainingEvaluator(
            sets,
            settings=self.settings,
            batches=lambda one: self.watchdog.watching(
                self.supplies[one.prefix], doing="evaluating"
            ),
        )
        self.prober = self._open_prober()
        self.key_log = self._open_key_log()
        self.watchdog = Watchdog(
            run.scale.hang_timeout_s if group.is_watched else 0,
            tell=lambda line: self._note(f"worker {group.rank}: {line}"),
        )
        self.memory = PeakMemory(self.device)
        self._last_log: dict[str, float] = {}

    def __enter__(self) -> Worker:
        self.watchdog.__enter__()
        for supply in self.supplies.values():
            supply.start()
        begun = WorkerStarted(
            rank=self.rank,
            world_size=self.settings.world_size,
            host=socket.gethostname(),
            step=self.state.position.step,
            hardware=worker_facts(self.device, precision=self.settings.precision),
        )
        self.group.post(begun)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            with self.watchdog.paused():  # a slow store is not a worker that hangs
                self.keeper.close(is_done=kind is None)
        finally:
            self._close()

    def _close(self) -> None:
        self.watchdog.__exit__()
        for supply in self.supplies.values():
            supply.close()
        self.group.close()
        if self.key_log is not None:
            self.key_log.close()

    def train(self) -> None:
        """Train to the end of the run, or until the driver asks to end."""
        train(
            self.state,
            self.watchdog.watching(self.supplies["train"], doing="training"),
            settings=self.settings,
            on_log=self._log,
            on_epoch_end=self._end_epoch,
            on_checkpoint=self._keep,
            on_batch=self._log_keys,
            on_step_begin=self._probe,
            on_note=self._note,
            is_ending=self.group.should_stop,
            is_leaving=self.group.is_preempted,
        )

    def _probe(self, state: TrainState, batch: Batch) -> None:
        if self.prober is not None:
            self.prober(state, batch)

    def _open_prober(self) -> Prober | None:
        if self.rank != 0 or not self.run.probe.every_steps:
            return None

        def log(metrics: Mapping[str, float], step: int) -> None:
            self.group.post(Metrics(step=step, metrics=dict(metrics)))

        return Prober(self.state.model, settings=self.settings, on_probe=log)

    def _note(self, line: str) -> None:
        self.group.post(Message(line=line))

    def _log_keys(self, batch: Batch, step: int) -> None:
        if self.key_log is not None:
            self.key_log(batch, step)

    def _open_key_log(self) -> KeyLog | None:
        if not self.run.key_log:
            return None
        return KeyLog(
            Path(self.run.key_log),
            attempt=self.group.broadcast(time.time_ns()),
            step=self.state.position.step,
            rank=self.rank,
            num_repeats=self.run.augment.num_repeats,
        )

    def _supply(self, shards: ShardSet, *, split: str) -> Loader:
        run, is_train = self.run, split == "train"
        world_size = self.settings.world_size
        reading = reading_of(shards, run=run, train=is_train, num_workers=world_size)
        return Loader(
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

    def _log(self, metrics: Mapping[str, float], position: Position) -> None:
        self._last_log = dict(metrics)
        self.memory.look()
        if self.rank == 0:
            self._post(position)
            named = {f"train/{name}": value for name, value in metrics.items()}
            self.group.post(Metrics(step=position.step, metrics=named))

    def _post(
        self, position: Position, *, held_out: Mapping[str, float] | None = None
    ) -> None:
        event = Progress(
            step=position.step,
            epoch=position.epoch,
            metrics=self._last_log,
            epoch_metrics=held_out,
        )
        self.group.post(event)

    def _end_epoch(self, state: TrainState) -> None:
        """Evaluate where that is due, write a checkpoint and report."""
        validation, epoch = self.run.validation, state.position.epoch
        num_epochs = self.run.optim.total_epochs
        is_due = validation.is_due(epoch, num_epochs=num_epochs)
        metrics, held_out = dict[str, float](), dict[str, float]()
        for model in (state.model, state.ema.module if state.ema else None):
            if model is not None:
                share_buffers(model)
        if is_due and not validation.beside:
            metrics |= self.together(state)
            held_out = self.together.primary.values()
            title = f"{self.run.recipe}, epoch {epoch}"
            is_last = epoch == num_epochs
            pictures = None
            if self.rank == 0 and self.job.keeps_model:
                pictures = self.together.pictures(title=title, is_last=is_last)
            if pictures is not None:
                self.group.post(pictures)
        metrics |= {f"train/{k}": v for k, v in self.memory.metrics().items()}
        metrics["epoch"] = epoch
        if self.prober is not None:
            metrics |= self.prober.summary()
        position = state.position
        if self.rank == 0:
            # Before the report, with which a sweep may end this run.
            self.group.post(Metrics(step=position.step, metrics=metrics))
            self._post(position, held_out=held_out)
        name = f"epoch_{position.epoch:04d}"
        self._report(state, name=name, metrics=metrics, can_wait=True)
        if self.prober is not None:
            title = f"{self.run.recipe}, to epoch {position.epoch}"
            draw = partial(draw_bands, tuple(self.prober.bands), title=title)
            path = f"probes/epoch_{position.epoch:04d}.png"
            self.group.post(Figure(draw=draw, path=path))

    def _keep(self, state: TrainState) -> None:
        """Write a checkpoint within an epoch: nothing is evaluated."""
        name = f"step_{state.position.step:08d}"
        # Asked to end, it is the last one.
        is_last = self.group.should_stop()
        self._report(state, name=name, metrics={}, can_wait=is_last)

    def _report(
        self,
        state: TrainState,
        *,
        name: str,
        metrics: Mapping[str, float],
        can_wait: bool,
    ) -> None:
        """Have a checkpoint written with what was measured last, and report that.

        A barrier of all workers: what training waits for here is a copy.
        """
        metrics = {f"train/{k}": v for k, v in self._last_log.items()} | dict(metrics)
        with self.watchdog.paused():
            self.keeper.keep(state, name=name, metrics=metrics, can_wait=can_wait)
            self.group.report(metrics)
