"""Estimate one worker's memory: arithmetic, and a step's measured activations.

By peak resident memory of a fresh process, two steps of So-ViT-7, So-ViT-14 and
iSQRT-ResNet-50 took 0.98 to 1.24 times that (2 cores of an AMD EPYC, 2026-11-27): what
an allocator and its libraries add is not in it.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipelines.config import Optim, Run
from pipelines.dry_run.activation_memory import StepMemory
from pipelines.training.model import Parameters

_BYTES_PER_VALUE = 4
# Beside those that wait: one that the model has, two on the decoder's way.
_NUM_BATCHES_BESIDE = 3
# Of a GPU, beside PyTorch's tensors. Assumptions, not measured: CUDA's context with the
# kernels of its libraries, and what NCCL keeps to talk to others through.
_CONTEXT_BYTES = 600_000_000
_NCCL_BYTES = 500_000_000
# DALI's pools by arithmetic: two batches on their way, each image decoded at twice the
# model's side, then resized, cut and changed by operations, in bytes; and nvJPEG's
# memory of each thread (`device_memory_padding`).
_NUM_BATCHES_IN_DALI = 2
_DALI_BYTES_PER_PIXEL = 3 * (4 + 4)
_DALI_BYTES_PER_THREAD = 16 << 20


@dataclass(frozen=True, kw_only=True)
class Memory:
    """One worker's memory in bytes, by purpose."""

    weights: int
    gradients: int
    optimizer: int
    average: int
    activations: int
    """What a micro-batch's forward pass keeps for its backward pass."""
    passing: int
    """What the two passes need temporarily beside that."""
    batches: int
    """Decoded images in use or prefetched."""
    context: int = 0
    """CUDA's context and libraries on a GPU: an assumption."""
    nccl: int = 0
    """What NCCL keeps on a GPU that is one of several: an assumption."""
    dali: int = 0
    """DALI's pools on a GPU: arithmetic."""

    @property
    def total(self) -> int:
        """Their sum, as if all were needed at the same time."""
        return sum(vars(self).values())


def estimate_memory(run: Run, *, parameters: Parameters, step: StepMemory) -> Memory:
    """Estimate a worker's memory, beside Python's, PyTorch's and Ray's own."""
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
        **_beside_tensors(run),
    )


def _beside_tensors(run: Run) -> dict[str, int]:
    """Estimate a GPU's memory outside PyTorch's allocator."""
    if not run.scale.use_gpu:
        return {}
    pixels = run.micro_batch_size * run.model.img_size**2
    decodes = run.data.decode_on == "workers" and run.data.decoder != "torch"
    num_threads = run.data.num_decode_threads
    return {
        "context": _CONTEXT_BYTES,
        "nccl": _NCCL_BYTES if run.scale.world_size > 1 else 0,
        "dali": decodes
        * (
            _NUM_BATCHES_IN_DALI * _DALI_BYTES_PER_PIXEL * pixels
            + num_threads * _DALI_BYTES_PER_THREAD
        ),
    }


def optimizer_bytes(optim: Optim, *, parameters: Parameters) -> int:
    """Count the optimiser state's bytes: AdamW's two moments, SGD's momentum.

    Muon's are between the two, and counted as AdamW's.
    """
    if optim.optimizer != "sgd":
        return 2 * parameters.num_trained_bytes
    return parameters.num_trained_bytes if optim.momentum else 0


def checkpoint_bytes(run: Run, *, parameters: Parameters) -> int:
    """Count the bytes of a checkpoint: weights, average and the optimiser's state."""
    weights = parameters.num_bytes + parameters.num_buffer_bytes
    state = optimizer_bytes(run.optim, parameters=parameters)
    return (2 if run.optim.ema_decay else 1) * weights + state
