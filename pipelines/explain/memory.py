"""Estimate the memory of one worker: arithmetic, and what a step was seen to keep.

By peak resident memory of a fresh process, two steps of So-ViT-7, So-ViT-14 and
iSQRT-ResNet-50 took 0.98 to 1.24 times that (2 cores of an AMD EPYC, 2026-11-27): what
an allocator and its libraries add is not in it.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipelines.config import Optim, Run
from pipelines.explain.activations import StepMemory
from pipelines.explain.counting import Parameters

_BYTES_PER_VALUE = 4
# Beside those that wait: one that the model has, two on the decoder's way.
_NUM_BATCHES_BESIDE = 3


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Hold the bytes of one worker by what they are for."""

    weights: int
    gradients: int
    optimizer: int
    average: int
    activations: int
    """What a micro-batch's backward pass needs of its forward pass."""
    passing: int
    """What the two passes need for a while beside that."""
    batches: int
    """Decoded images that the model has, or that wait for it."""

    @property
    def total(self) -> int:
        """Sum them up, as if all came at the same time."""
        return sum(vars(self).values())


def estimate_memory(run: Run, *, parameters: Parameters, step: StepMemory) -> Memory:
    """Estimate a worker's bytes, beside Python's, PyTorch's and Ray's own."""
    # FSDP leaves a worker its part of parameters and what belongs to them.
    num_parts = run.scale.world_size if run.scale.sharding == "fsdp" else 1
    size = run.model.img_size
    batch = run.micro_batch_size * 3 * size * size * _BYTES_PER_VALUE
    weights = parameters.num_bytes // num_parts + parameters.num_buffer_bytes
    return Memory(
        weights=weights,
        gradients=parameters.num_trained_bytes // num_parts,
        optimizer=optimizer_bytes(run.optim, parameters=parameters) // num_parts,
        average=weights if run.optim.ema_decay else 0,
        activations=step.kept,
        passing=step.peak - step.kept,
        batches=(run.data.num_prefetch_batches + _NUM_BATCHES_BESIDE) * batch,
    )


def optimizer_bytes(optim: Optim, *, parameters: Parameters) -> int:
    """Give the bytes of the optimiser's state: AdamW's two moments, SGD's momentum."""
    if optim.optimizer == "adamw":
        return 2 * parameters.num_trained_bytes
    return parameters.num_trained_bytes if optim.momentum else 0


def checkpoint_bytes(run: Run, *, parameters: Parameters) -> int:
    """Give the bytes of a checkpoint: weights, average and the optimiser's state."""
    weights = parameters.num_bytes + parameters.num_buffer_bytes
    state = optimizer_bytes(run.optim, parameters=parameters)
    return (2 if run.optim.ema_decay else 1) * weights + state
