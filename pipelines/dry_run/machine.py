"""Inspect this machine, and warn of resources that a run needs and it lacks."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipelines.config import Run
from pipelines.driver.preflight import reserves_too_few
from pipelines.hardware.device import gpus_here, pages_bytes


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Resources of this machine."""

    num_cpus: int
    num_gpus: int
    memory_bytes: int
    """0 if unknown."""
    gpu_bytes: int
    """Of one GPU; 0 without one."""
    disk_bytes: int
    """Free space for checkpoints; 0 if they go to no local path."""
    is_on_cluster: bool
    """Whether a run would join an existing Ray cluster."""


def this_machine(storage: str) -> Machine:
    """Inspect the machine that this process runs on."""
    num_gpus, gpu_bytes = gpus_here()
    return Machine(
        num_cpus=os.cpu_count() or 1,
        num_gpus=num_gpus,
        memory_bytes=pages_bytes("SC_PHYS_PAGES"),
        gpu_bytes=gpu_bytes,
        disk_bytes=_free_bytes(storage),
        is_on_cluster=bool(os.environ.get("RAY_ADDRESS")),
    )


def _free_bytes(storage: str) -> int:
    if "://" in storage:
        return 0
    folder = Path(storage).absolute()
    there = next(path for path in (folder, *folder.parents) if path.is_dir())
    return shutil.disk_usage(there).free


def warnings_of(
    run: Run, *, machine: Machine, worker_bytes: int, checkpoints_bytes: int
) -> Iterator[str]:
    """Warn of what would keep a run from starting, or from finishing, on this machine.

    Args:
        worker_bytes: Memory that one worker needs.
        checkpoints_bytes: Bytes of all checkpoints that are stored at the same time.
    """
    schedule, num_epochs = run.optim.schedule, run.optim.num_epochs
    late = [f"{epoch:g}" for epoch in schedule.milestones if epoch > num_epochs]
    if late and schedule.kind in ("step", "piecewise"):
        yield (
            f"the rate's milestones in epoch {', '.join(late)} lie after the "
            f"schedule's last, {num_epochs}: set --optim.schedule.milestones"
        )
    if machine.is_on_cluster:
        if "://" not in run.storage:
            yield "every host of the cluster must see the storage folder under its path"
        return
    if run.scale.use_gpu and not machine.num_gpus:
        yield "it wants GPUs, and here is none: start it there, or set RAY_ADDRESS"
        return  # of such a machine nothing else is known
    if 0 < machine.disk_bytes < checkpoints_bytes:
        yield "there is less room on the disk than its checkpoints take"
    yield from _lacks(run, machine=machine)
    yield from _narrow(run, machine=machine, worker_bytes=worker_bytes)


def _lacks(run: Run, *, machine: Machine) -> Iterator[str]:
    """Warn of resources that workers would lack here or have to share."""
    scale, less = run.scale, "lower --scale.num-workers"
    if scale.use_gpu and machine.num_gpus < scale.world_size:
        yield (
            f"{scale.world_size} workers want a GPU each, here are "
            f"{machine.num_gpus}: {less}, or set RAY_ADDRESS to a cluster"
        )
    wanted = scale.world_size * scale.cpus_per_worker
    if wanted > machine.num_cpus:
        yield (
            f"{scale.world_size} workers want {wanted:g} CPUs, here are "
            f"{machine.num_cpus}: {less} or --scale.cpus-per-worker, or set "
            "RAY_ADDRESS to a cluster"
        )
    if short := reserves_too_few(run):
        yield short
    num_threads = scale.world_size * run.data.num_decode_threads
    if num_threads > max(machine.num_cpus, scale.world_size):
        yield (
            f"{num_threads} threads that decode share {machine.num_cpus} CPUs: lower "
            "--data.num-decode-threads"
        )


def _narrow(run: Run, *, machine: Machine, worker_bytes: int) -> Iterator[str]:
    """Warn if a worker's tensors exceed the memory."""
    less = "raise --optim.num-accumulation, or set --scale.grad-checkpointing"
    if run.scale.use_gpu:
        if 0 < machine.gpu_bytes < worker_bytes:
            yield f"a worker's memory is more than that of a GPU here: {less}"
    elif 0 < machine.memory_bytes < run.scale.world_size * worker_bytes:
        yield f"the workers' memory is more than this machine has: {less}"
