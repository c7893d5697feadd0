"""Train as one worker: model, streams, checkpoints and the events it posts."""

from __future__ import annotations

import socket
import time
from pathlib import Path

import torch

from pipelines.config.recipes import load_code
from pipelines.data.loader import Loader, Plans, reading_of
from pipelines.data.shard_set import ShardSet
from pipelines.evaluation.in_training import InTrainingEvaluator
from pipelines.events.bad_images import BadImageTeller
from pipelines.events.channel import Message, WorkerStarted
from pipelines.hardware.device import autocast_dtype, is_gpu
from pipelines.hardware.facts import worker_facts
from pipelines.hardware.row_limit import RowLimit
from pipelines.training.step import TrainSettings
from pipelines.worker.audit_log import AuditLog
from pipelines.worker.checkpointing import Checkpointer
from pipelines.worker.gradient_probe import Prober
from pipelines.worker.group import Group
from pipelines.worker.job import Job
from pipelines.worker.loop import TrainingLoop
from pipelines.worker.watchdog import Watchdog


class Worker:
    """One worker of a run: opens and closes the resources of its training loop."""

    def __init__(self, job: Job, *, group: Group) -> None:
        run = job.run
        if job.code:
            load_code(job.code)
        self.run, self.group, self.rank = run, group, group.rank
        self.device = group.device
        if not is_gpu(self.device):
            torch.set_num_threads(max(int(run.scale.cpus_per_worker), 1))
        epoch = Plans(shards=job.train_shards, run=run, train=True).shape(0)
        self.settings = TrainSettings(
            run=run,
            num_classes=len(job.train_shards.classes),
            steps_per_epoch=epoch.num_batches,
            images_per_epoch=epoch.num_rows,
            device=self.device,
            world_size=group.world_size,
            rank=group.rank,
            class_counts=job.class_counts,
        )
        self.keeper = Checkpointer(job, group=group)
        self.state = self.keeper.state()
        # In the same order on every worker: opening is a collective.
        sets = () if run.validation.asynchronous else job.held_out
        self.supplies = {"train": self._supply(job.train_shards, split="train")}
        for one in sets:
            self.supplies[one.prefix] = self._supply(one.shards, split=one.prefix)
        self.watchdog = Watchdog(
            run.scale.hang_timeout_s if group.is_watched else 0,
            tell=lambda line: group.post(Message(line=f"worker {group.rank}: {line}")),
        )
        self.audit_log = self._open_audit_log()
        self.loop = TrainingLoop(
            state=self.state,
            settings=self.settings,
            batches=self.supplies["train"],
            group=group,
            checkpointer=self.keeper,
            early_stopping=self.keeper.early_stopping(),
            evaluator=InTrainingEvaluator(
                sets,
                run=run,
                device=self.device,
                batches=lambda one: self.watchdog.watching(
                    self.supplies[one.prefix], doing="evaluating"
                ),
                limit=RowLimit(on_lowered=self._tell_lowered),
            ),
            watchdog=self.watchdog,
            prober=self._open_prober(),
            audit_log=self.audit_log,
            keeps_pictures=job.keeps_model,
        )

    def __enter__(self) -> Worker:
        self.watchdog.__enter__()
        for supply in self.supplies.values():
            supply.start()
        dtype = autocast_dtype(self.device, amp=self.run.scale.amp)
        precision = str(dtype).removeprefix("torch.")
        begun = WorkerStarted(
            rank=self.rank,
            world_size=self.settings.world_size,
            host=socket.gethostname(),
            step=self.state.position.step,
            hardware=worker_facts(self.device, precision=precision),
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
        if self.audit_log is not None:
            self.audit_log.close()

    def train(self) -> None:
        """Train to the end of the run, or until the driver asks to stop."""
        self.loop.train()

    def _tell_lowered(self, line: str, max_rows: int) -> None:
        self.group.post(Message(line=f"worker {self.rank}: {line}"))

    def _open_prober(self) -> Prober | None:
        if self.rank != 0 or not self.run.probe.every_steps:
            return None
        return Prober(self.state.model, settings=self.settings)

    def _open_audit_log(self) -> AuditLog | None:
        if not self.run.audit_log:
            return None
        return AuditLog(
            Path(self.run.audit_log),
            attempt=self.group.broadcast(time.time_ns()),
            step=self.state.position.step,
            rank=self.rank,
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
