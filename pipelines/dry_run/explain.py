"""Find out what a run will do, as far as that is known before it starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from pipelines import tracking
from pipelines.checkpoints.manifest import peek
from pipelines.checkpoints.run_record import Record
from pipelines.checkpoints.store import CheckpointStore
from pipelines.config import Run
from pipelines.data.batch import Position
from pipelines.driver.preflight import check_start, with_absolute_paths
from pipelines.dry_run.activation_memory import StepMemory, measure_step
from pipelines.dry_run.machine import this_machine, warnings_of
from pipelines.dry_run.memory import Memory, checkpoint_bytes, estimate_memory
from pipelines.dry_run.progress_left import Remaining, SetFacts, facts_of, remaining_of
from pipelines.dry_run.timing import Timed, time_here
from pipelines.hardware.device import autocast_dtype, device_of, free_memory, has_gpu
from pipelines.storage.path import StoragePath
from pipelines.storage.redaction import error_summary, without_credentials
from pipelines.training.model import (
    Parameters,
    count_macs,
    count_parameters,
    count_training_macs,
    shapes_of,
)

# Of a device's free memory, that timing may take.
_SHARE_FOR_TIMING = 0.5
# Beside the last few: the best one, and one that is being written.
_NUM_CHECKPOINTS_BESIDE = 2


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where a run writes, without credentials, and what is stored there."""

    folder: str
    checkpoint_bytes: int
    """Of each."""
    num_checkpoints: int
    """Largest number that is stored at the same time."""
    goes_on_from: str | None
    """The newest checkpoint, "" if there is none yet; None for a new run."""
    mlflow: str


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """All that a dry run found out about a run."""

    run: Run
    num_classes: int
    parameters: Parameters
    macs: int
    """Multiply-adds of one image."""
    training_macs: int
    """Those of its forward and backward pass together."""
    train: SetFacts
    balance: str
    """A line on what epochs are made of; "" where every image comes once."""
    held_out: Mapping[str, SetFacts]
    """By name; the run's own set has none."""
    course: Remaining
    is_bfloat16: bool
    memory: Memory | None
    """None if the model's step can't be measured on fake tensors."""
    why_no_memory: str
    timed: Timed | None
    """None if this machine lacks the run's device."""
    places: Places
    warnings: tuple[str, ...]

    @property
    def flops_left(self) -> float:
        """Floating-point operations that are left, two per multiply-add."""
        course = self.course
        trained = self.training_macs * course.num_images_left
        return 2.0 * (trained + self.macs * course.num_evaluated_left)

    def hours(self, rate: float) -> float:
        """Estimate the hours left if each worker computes `rate` FLOP/s."""
        return self.flops_left / rate / self.run.scale.world_size / 3600


def explain_run(run: Run, *, name: str, record: Record | None = None) -> Explanation:
    """Find out what a run will do, without starting or writing anything.

    A few steps on random images are timed if this machine has the run's device.

    Args:
        record: That of the run to go on with; None for a new run.

    Raises ValueError where the run would do so before it starts.
    """
    run = with_absolute_paths(run)
    checked = check_start(run, name=name, record=record)
    num_classes = len(checked.train_shards.classes)
    parameters, macs, training_macs = _count(run, num_classes=num_classes)
    places, start = _places(
        run, name=name, is_new=record is None, parameters=parameters
    )
    is_bfloat16 = _computes_in_bfloat16(run)
    step, why = _step_memory(run, num_classes=num_classes, is_bfloat16=is_bfloat16)
    memory = step and estimate_memory(run, parameters=parameters, step=step)
    timed = _timed(
        run, num_classes=num_classes, training_macs=training_macs, memory=memory
    )
    return Explanation(
        run=run,
        num_classes=num_classes,
        parameters=parameters,
        macs=macs,
        training_macs=training_macs,
        train=facts_of(checked.train_shards),
        balance=checked.balance,
        held_out={one.name: facts_of(one.shards) for one in checked.held_out},
        course=remaining_of(
            run,
            train_shards=checked.train_shards,
            num_held_out=sum(one.shards.groups.total_rows for one in checked.held_out),
            start=start,
        ),
        is_bfloat16=is_bfloat16,
        memory=memory,
        why_no_memory=why,
        timed=timed,
        places=places,
        warnings=(
            *filter(None, [checked.few_tokens]),
            *warnings_of(
                run,
                machine=this_machine(run.storage),
                worker_bytes=memory.total if memory else 0,
                checkpoints_bytes=places.num_checkpoints * places.checkpoint_bytes,
            ),
        ),
    )


def _places(
    run: Run, *, name: str, is_new: bool, parameters: Parameters
) -> tuple[Places, Position]:
    """Find where a run writes, and the position that it resumes from."""
    folder, goes_on_from, start = (
        StoragePath(run.storage).within(name),
        None,
        Position(),
    )
    if not is_new:
        store = CheckpointStore(folder, num_to_keep=run.num_checkpoints_to_keep)
        goes_on_from = store.newest()
        manifest = peek(store.place(goes_on_from)) if goes_on_from else None
        start = manifest.position if manifest else start
    places = Places(
        folder=str(folder),
        checkpoint_bytes=checkpoint_bytes(run, parameters=parameters),
        num_checkpoints=run.num_checkpoints_to_keep + _NUM_CHECKPOINTS_BESIDE,
        goes_on_from=goes_on_from,
        mlflow=without_credentials(tracking.default_uri(run.storage)),
    )
    return places, start


def _count(run: Run, *, num_classes: int) -> tuple[Parameters, int, int]:
    model = shapes_of(
        run.model,
        num_classes=num_classes,
        grad_checkpointing=run.scale.grad_checkpointing,
        optim=run.optim,
    )
    size = run.model.img_size
    return (
        count_parameters(model),
        count_macs(model, img_size=size),
        count_training_macs(model, img_size=size),
    )


def _device(run: Run) -> torch.device | None:
    """Return the run's device; None if this machine lacks it."""
    if run.scale.use_gpu and not has_gpu():
        return None
    return device_of(run.scale.use_gpu, flag="--scale.use-gpu")


def _computes_in_bfloat16(run: Run) -> bool:
    """Check whether a run computes in bfloat16; a remote GPU is assumed to."""
    device = _device(run)
    if device is None:
        return run.scale.amp == "auto"
    return autocast_dtype(device, amp=run.scale.amp) == torch.bfloat16


def _step_memory(
    run: Run, *, num_classes: int, is_bfloat16: bool
) -> tuple[StepMemory | None, str]:
    try:
        step = measure_step(
            run,
            num_classes=num_classes,
            batch_size=run.micro_batch_size,
            use_bfloat16=is_bfloat16,
        )
    except (
        RuntimeError
    ) as error:  # a model that looks at values, of which there are none
        return None, error_summary(error)
    return step, ""


def _timed(
    run: Run, *, num_classes: int, training_macs: int, memory: Memory | None
) -> Timed | None:
    device = _device(run)
    if device is None:
        return None
    room_images = run.micro_batch_size
    free = free_memory(device)
    if memory and free:
        by_image = memory.activations + memory.passing + memory.batches
        room = _SHARE_FOR_TIMING * free - (memory.total - by_image)
        room_images = int(room / (by_image / run.micro_batch_size))
    return time_here(
        run,
        num_classes=num_classes,
        training_macs=training_macs,
        device=device,
        room_images=room_images,
    )
