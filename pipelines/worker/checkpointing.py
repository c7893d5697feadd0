"""Restore a worker's state from the newest checkpoint, and write new ones."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import TypedDict

import torch
from torch import nn

from pipelines.checkpoints import manifest as ckpt
from pipelines.checkpoints.pretrained import load_initial
from pipelines.checkpoints.snapshot import Snapshot, assist_snapshot, take_snapshot
from pipelines.checkpoints.store import CheckpointStore, CheckpointWriter, score_of
from pipelines.evaluation.held_out import keys_of
from pipelines.events.channel import Message, Metrics
from pipelines.hardware.row_limit import RowLimit
from pipelines.storage.path import StoragePath
from pipelines.storage.redaction import error_summary
from pipelines.training.model import is_sharded
from pipelines.training.state import TrainState, build_state, shard_state
from pipelines.worker.early_stopping import EarlyStopping
from pipelines.worker.group import Group
from pipelines.worker.job import Job

MEMORY_FILE = "memory.json"
"""File in a run's folder with the limit that was found when memory ran out."""


class Checkpointer:
    """A worker's access to its run's checkpoints; rank 0 writes them."""

    def __init__(self, job: Job, *, group: Group) -> None:
        self._job, self._run, self._group = job, job.run, group
        self._classes = job.train_shards.classes
        self._store = CheckpointStore(
            group.folder,
            num_to_keep=job.run.num_checkpoints_to_keep,
            metric=job.run.validation.metric,
            waits=job.run.validation.asynchronous,
        )
        self._writer: CheckpointWriter | None = None
        if group.rank == 0:
            self._store.clean()
            self._writer = CheckpointWriter(
                self._store,
                tell=group.post,
                max_failures=job.run.max_failed_checkpoints,
            )

    def state(self) -> TrainState:
        """Build the training state, restored from the newest checkpoint, if any.

        A collective: all workers load the checkpoint that rank 0 has found.
        """
        is_first = self._group.rank == 0
        name = self._group.broadcast(self._store.newest() if is_first else "")
        if not name:
            return self._built(self._start)
        with self._store.opened(name) as folder:
            manifest = ckpt.read_manifest(folder)
            state = self._built(
                lambda model: ckpt.load_weights(model, folder),
                lambda average: ckpt.load_weights(average, folder, ema=True),
            )
            ckpt.load_optimizer(state.optimizer, folder)
            shard_state(state.optimizer)
        state.position = manifest.position
        return state

    def early_stopping(self) -> EarlyStopping:
        """Build the tracker of the best score, from the best checkpoint, if any.

        A collective, as `state` is.
        """
        metrics: Mapping[str, float] = {}
        if self._group.rank == 0 and (best := self._store.best()) is not None:
            metrics = best.metrics
        validation = self._run.validation
        return EarlyStopping(
            validation,
            best_epoch=self._group.broadcast(int(metrics.get("epoch", 0))),
            best_score=self._group.broadcast(
                score_of(metrics, metric=validation.metric)
            ),
        )

    def keep(
        self,
        state: TrainState,
        *,
        name: str,
        metrics: Mapping[str, float],
        can_wait: bool,
    ) -> None:
        """Write a checkpoint asynchronously; training waits for a copy of its state.

        All workers call this alike, a collective if the model is sharded. Raises as
        `CheckpointWriter.write`.
        """
        start_s = time.perf_counter()
        sharded = is_sharded(state.model.parameters())
        if self._writer is None:
            if sharded:
                assist_snapshot(**_parts_of(state))
            return
        take = partial(self._snapshot, state, metrics=metrics)
        if sharded:
            # Put together by all, whether the first can write it now or not.
            take = partial(lambda taken: taken, take())
        self._writer.write(take, name=name, can_wait=can_wait)
        stall = {"train/checkpoint_s": time.perf_counter() - start_s}
        self._group.post(Metrics(step=state.position.step, metrics=stall))

    def close(self, *, is_done: bool) -> None:
        """Wait for the pending write; raises as `CheckpointWriter.close`."""
        if self._writer is not None:
            self._writer.close(is_done=is_done)

    def _built(
        self,
        load: Callable[[nn.Module], None],
        load_average: Callable[[nn.Module], None] = lambda average: None,
    ) -> TrainState:
        return build_state(
            self._run,
            num_classes=len(self._classes),
            device=self._group.device,
            world_size=self._group.world_size,
            rank=self._group.rank,
            keys_of=partial(keys_of, self._job.train_shards),
            load=load,
            load_average=load_average,
            tell=self._tell,
            limit=self._limit(),
        )

    def _limit(self) -> RowLimit:
        """Read the limit that this run has found before, on rank 0: a collective.

        Beside the checkpoints, since memory may run out before there is one.
        """
        found = self._found_rows() if self._group.rank == 0 else 0
        return RowLimit(
            max_rows=self._group.broadcast(found), on_lowered=self._keep_limit
        )

    def _found_rows(self) -> int:
        try:
            return int(json.loads(self._memory_file.read())["max_rows"])
        except (OSError, ValueError, KeyError, TypeError):
            return 0  # it is found again

    def _keep_limit(self, line: str, max_rows: int) -> None:
        # By whichever worker ran out, for all of them after their restart.
        group = self._group
        if group.world_size > 1:
            line = f"worker {group.rank}: {line}"
        try:
            self._memory_file.write(json.dumps({"max_rows": max_rows}).encode())
        except OSError as error:
            line += f"; not kept for a restart ({error_summary(error)})"
        group.post(Message(line=line))

    @property
    def _memory_file(self) -> StoragePath:
        return self._group.folder.within(MEMORY_FILE)

    def _tell(self, line: str) -> None:
        """Post a message that all workers have once, from rank 0."""
        if self._group.rank == 0:
            self._group.post(Message(line=line))

    def _start(self, model: nn.Module) -> None:
        """Load the initial weights of another training, if configured."""
        settings = self._run.model
        if settings.init_from:
            load_initial(
                model,
                settings.init_from,
                classes=self._classes,
                triangle=settings.triangle,
            )

    def _snapshot(self, state: TrainState, *, metrics: Mapping[str, float]) -> Snapshot:
        return take_snapshot(
            run=self._run,
            position=state.position,
            classes=self._classes,
            metrics=metrics,
            **_parts_of(state),
        )


class _Parts(TypedDict):
    model: nn.Module
    ema: nn.Module | None
    optimizer: torch.optim.Optimizer


def _parts_of(state: TrainState) -> _Parts:
    """Return the parts of a state that a checkpoint stores."""
    average = state.ema.module if state.ema is not None else None
    return {"model": state.model, "ema": average, "optimizer": state.optimizer}
